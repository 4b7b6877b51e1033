"""What the server remembers for a while, in memory: uploads and results under names nobody can guess."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from typing import Any, Protocol

from pbe.errors import UserError


class Item(Protocol):
    """What can be kept: it says how large it is."""

    @property
    def nbytes(self) -> int:
        """Size in memory."""


class Store:
    """Keeps items for so many seconds, the newest first where they are more than ``max_bytes`` together."""

    def __init__(self, seconds: float, max_bytes: int = 2**30) -> None:
        self.seconds = seconds
        self.max_bytes = max_bytes
        self._items: OrderedDict[str, tuple[float, Any]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, item: Item) -> str:
        """Keep an item, and return the name to ask for it."""
        name = secrets.token_urlsafe(18)
        with self._lock:
            self._forget(time.monotonic() - self.seconds, item.nbytes)
            self._items[name] = (time.monotonic(), item)
            self._bytes += item.nbytes
        return name

    def get(self, name: str) -> Any:
        """Return an item; one that is too old or never was is an error."""
        with self._lock:
            self._forget(time.monotonic() - self.seconds)
            if name not in self._items:
                raise UserError("this image is no longer on the server; choose it again")
            return self._items[name][1]

    def sweep(self) -> None:
        """Forget what is too old."""
        with self._lock:
            self._forget(time.monotonic() - self.seconds)

    def _forget(self, before: float, room: int = 0) -> None:
        while self._items:
            name, (since, item) = next(iter(self._items.items()))
            if since >= before and self._bytes + room <= self.max_bytes:
                return
            del self._items[name]
            self._bytes -= item.nbytes
