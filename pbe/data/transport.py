"""Batches on their way out of worker processes, in shared memory that is used again.

Torch gives every tensor of every batch a shared file of its own: a socket handshake each, a second copy of
the bytes, and fresh pages that both processes must fault in. Here a worker stacks a batch straight into one
of a few slots, and the main process gets the slot's number. A slot is used again when the last tensor that
looks into it is gone in the main process, not before: a batch that is kept stays what it is, and the worker
makes another slot meanwhile.
"""

from __future__ import annotations

import itertools
import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

FREE, HELD, RETIRED = 0, 1, 2  # the state of a slot, its first byte
ALIGNMENT = 64  # bytes; the state has a line of its own
KEPT_SLOTS = 8  # a worker; batches beyond these, which somebody collects, get memory that is used once

Wanted = tuple[tuple[int, ...], np.dtype[Any]]
Allocator = Callable[[Sequence[Wanted]], list[np.ndarray]]
Layout = tuple[tuple[str, tuple[int, ...], torch.dtype, int], ...]

_KEYS = itertools.count()
_INBOXES: weakref.WeakValueDictionary[int, Inbox] = weakref.WeakValueDictionary()


def allocate(wanted: Sequence[Wanted]) -> list[np.ndarray]:
    """Return uninitialised arrays of these shapes and types in this process's own memory."""
    return [np.empty(shape, kind) for shape, kind in wanted]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Inbox:
    """The main process's end: it knows the slots of a loader's workers, and lives as long as the loader."""

    def __init__(self) -> None:
        self.key = next(_KEYS)
        self.slots: dict[tuple[int, int], np.ndarray] = {}
        _INBOXES[self.key] = self

    def retire_held(self) -> None:
        """Never use those slots again that hold a batch now."""
        for slot in list(self.slots.values()):
            if slot[0] == HELD:
                slot[0] = RETIRED


def _before_fork() -> None:
    # A copy of this process sees the same slots, and may keep its batches when they are gone here.
    for inbox in list(_INBOXES.values()):
        inbox.retire_held()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)


def _release(slot: np.ndarray, owner: int) -> None:
    """Give a slot back whose last tensor is gone; in the process that was given it only."""
    if os.getpid() == owner and slot[0] == HELD:
        slot[0] = FREE


def _tensors(slot: np.ndarray, layout: Layout) -> dict[str, torch.Tensor]:
    """Return tensors that look into a slot, and give it back when the last of them is gone."""
    window = slot[:]
    whole = torch.from_numpy(window)  # its storage, which all of its views share, keeps the window alive
    weakref.finalize(window, _release, slot, os.getpid()).atexit = False
    return {
        name: whole[start : start + math.prod(shape) * kind.itemsize].view(kind).view(shape)
        for name, shape, kind, start in layout
    }


def _unpack(
    key: int, place: tuple[int, int], sent: torch.Tensor | None, layout: Layout, others: dict[str, Any]
) -> dict[str, Any]:
    """Return the batch of a parcel, in the process that the loader belongs to."""
    inbox = _INBOXES.get(key)
    if inbox is None:  # the loader is gone, and with it everyone who waits for this batch
        return others
    slot = inbox.slots[place] if sent is None else sent.numpy()
    if place[1] < KEPT_SLOTS:
        inbox.slots[place] = slot
    return others | _tensors(slot, layout)


class Parcel:
    """A batch in a slot; it arrives as the dictionary that it was."""

    def __init__(self, *contents: Any) -> None:
        self._contents = contents

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the slot's number, and the slot itself the first time, and how to look into it."""
        return _unpack, self._contents


class Outbox:
    """Collates samples; in a worker into slots that the loader's inbox opens, elsewhere as ever.

    Args:
        collate: makes a dictionary of a list of samples; the arrays of its tensors come from the allocator
            that it is given, which it calls at most once.
        key: of the inbox.
    """

    def __init__(self, collate: Callable[[Sequence[Any], Allocator], dict[str, Any]], key: int) -> None:
        self.collate = collate
        self.key = key
        self._slots: list[torch.Tensor] = []
        self._place = 0
        self._slot: torch.Tensor | None = None
        self._is_new = False

    def __call__(self, items: Sequence[Any]) -> Any:
        """Return the batch, or a parcel that arrives as the batch."""
        worker = get_worker_info()
        if worker is None:
            return self.collate(items, allocate)
        self._slot = None
        batch = self.collate(items, self._allocate)
        if self._slot is None:
            return batch
        base = self._slot.data_ptr()
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        layout = tuple((n, tuple(t.shape), t.dtype, t.data_ptr() - base) for n, t in tensors.items())
        others = {name: value for name, value in batch.items() if name not in tensors}
        self._slot.numpy()[0] = HELD
        sent = self._slot if self._is_new else None
        return Parcel(self.key, (worker.id, self._place), sent, layout, others)

    def _allocate(self, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        sizes = [math.prod(shape) * kind.itemsize for shape, kind in wanted]
        starts = [0, *itertools.accumulate(_aligned(size) for size in sizes)]
        self._slot = self._take(ALIGNMENT + starts[-1])
        room = self._slot.numpy()[ALIGNMENT:]
        return [
            room[start : start + size].view(kind).reshape(shape)
            for start, size, (shape, kind) in zip(starts[:-1], sizes, wanted, strict=True)
        ]

    def _take(self, size: int) -> torch.Tensor:
        """Return a slot that nobody holds, of at least ``size`` bytes."""
        states = [slot.numpy()[0] for slot in self._slots]
        for place, (state, slot) in enumerate(zip(states, self._slots, strict=True)):
            if state == FREE and len(slot) >= size:
                self._place, self._is_new = place, False
                return slot
        # A slot that is too small or retired makes room for the new one.
        self._place = next((place for place, state in enumerate(states) if state != HELD), len(states))
        self._is_new = True
        slot = torch.empty(size, dtype=torch.uint8).share_memory_()
        slot[0] = FREE
        if self._place < KEPT_SLOTS:
            self._slots[self._place : self._place + 1] = [slot]
        return slot
