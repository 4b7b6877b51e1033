"""Stops without loss: signals are remembered, and acted upon between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SIGUSR1 is what many a scheduler's script asks for, some minutes before the end; Windows has none.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


class TrainingStopped(Exception):  # noqa: N818 - a way out, not an error
    """A run ends early because a signal came; what it has done is saved."""


class StopSignals:
    """Remembers that Ctrl-C, SIGTERM or SIGUSR1 came; a second signal interrupts at once.

    Attributes:
        received: number of the signal, or 0.
    """

    def __init__(self) -> None:
        self.received = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def take_over(self) -> dict[int, Any]:
        """Become the handler of the signals; returns the handlers that were there."""
        return {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}

    def check(self) -> None:
        """Raise :class:`TrainingStopped` when a signal came."""
        if self.received:
            raise TrainingStopped

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside a ``with`` block."""
        previous = self.take_over()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
