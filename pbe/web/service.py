"""One model and the edits that wait for it: queued, batched where they match, watched, cancelled."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pbe.editing.batch.runner import memory_errors
from pbe.editing.engine import merge_choice
from pbe.editing.pipeline import PaintByExample
from pbe.editing.settings import EditSettings
from pbe.errors import UserError

logger = logging.getLogger(__name__)
STOPPING = "the server is stopping; try again in a minute"
GATHER, MOST_PATIENCE = 0.1, 0.25  # share of a batch's time, and seconds, to wait for others to join the next
PREVIEW_SHARE = 0.1  # of the time of an edit that its previews may take
EARLY = 0.02  # share of signal from which an estimate shows more than noise
SIGMA_SOLVERS = ("euler", "euler_ancestral", "heun", "lms")  # their latents are x_0 + sigma eps


class BusyError(UserError):
    """The queue is full, or the server is stopping."""


class CancelledEdit(Exception):  # noqa: N818  # it is no error
    """Nobody waits for the edits of a batch any more."""


@dataclass
class Made:
    """A finished edit: the image, whether a safety checker blackened it, and how many ran at once.

    Edits of one batch shape have the same bytes whatever else is in the batch, so that ``rows`` is all that
    is needed to make the edit again.
    """

    image: Image.Image
    blackened: bool
    rows: int


@dataclass(eq=False)
class Edit:
    """One edit that was asked for, and how far it is.

    Attributes:
        image: uint8 ``h w 3``.
        mask: bool ``h w``.
        exemplar: uint8 ``h w 3``.
        settings: checked, of a single image.
        watched: somebody looks at previews.
        done: the result, or why there is none.
        step: steps made.
        steps: of how many; 0 while it waits.
        preview: estimate of the result at the model's size, uint8 ``h w 3``.
        cancelled: nobody waits for it any more.
    """

    image: np.ndarray
    mask: np.ndarray
    exemplar: np.ndarray
    settings: EditSettings
    watched: bool = False
    done: Future[Made] = field(default_factory=Future)
    step: int = 0
    steps: int = 0
    preview: np.ndarray | None = None
    cancelled: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What edits must share to run in one batch."""
        return (self.image.shape, replace(self.settings, seed=0))


class EditService:
    """Runs edits one batch after another in a thread of its own.

    Args:
        pipe: the model; nobody else may use it meanwhile.
        batch_size: most edits at once.
        max_queue: most edits that wait.
    """

    def __init__(self, pipe: PaintByExample, batch_size: int, max_queue: int) -> None:
        self.pipe = pipe
        threads, on_cpu = torch.get_num_threads(), pipe.device.type == "cpu"
        even = not on_cpu or threads == power_of_two(threads)
        self.batch_size = power_of_two(batch_size) if even else 1
        self.max_queue = max_queue
        self._pending: deque[Edit] = deque()
        self._wake = threading.Condition()
        self._running: list[Edit] = []
        self._stopping = False
        self._patience = 0.0
        self._thread = threading.Thread(target=self._work, name="edits", daemon=True)
        self._thread.start()

    def submit(self, edits: Sequence[Edit]) -> None:
        """Put edits into the queue, all or none.

        Raises:
            BusyError: too many wait already, or the server is stopping.
        """
        with self._wake:
            if self._stopping:
                raise BusyError(STOPPING)
            if len(self._pending) + len(edits) > self.max_queue:
                raise BusyError(f"the queue is full ({len(self._pending)} edits wait); try again in a moment")
            self._pending.extend(edits)
            self._wake.notify()

    def ahead_of(self, edit: Edit) -> int:
        """Return how many edits wait before this one."""
        with self._wake:
            return self._pending.index(edit) if edit in self._pending else 0

    def cancel(self, edits: Sequence[Edit]) -> None:
        """Forget edits that wait; a running batch ends once nobody waits for any of it."""
        with self._wake:
            for edit in edits:
                edit.cancelled = True
                if edit in self._pending:
                    self._pending.remove(edit)
                    edit.done.cancel()

    def close(self, seconds: float) -> None:
        """Refuse what waits, give what runs so many seconds to finish, and end the thread."""
        with self._wake:
            self._stopping = True
            for edit in self._pending:
                if edit.done.set_running_or_notify_cancel():
                    edit.done.set_exception(BusyError(STOPPING))
            self._pending.clear()
            self._wake.notify()
        self._thread.join(seconds)
        for edit in self._running:
            edit.cancelled = True
        self._thread.join(5.0)

    def _work(self) -> None:
        while batch := self._next():
            self._running = batch
            try:
                self._run(batch)
            except CancelledEdit:
                problem: Exception = BusyError("the edit was cancelled")
            except UserError as error:
                problem = error
            except Exception:
                logger.exception("an edit failed")
                problem = RuntimeError("the edit failed; the server's log says why")
            else:
                continue
            for edit in batch:
                if not edit.done.done():
                    edit.done.set_exception(problem)

    def _next(self) -> list[Edit]:
        """Wait for work; return the oldest edit with others that match it, or nothing at the end.

        After a batch of several the clients that were answered ask again one by one, so the first of them is
        held back for a moment: else every other batch would be a single edit.
        """
        with self._wake:
            batch: list[Edit] = []
            while not batch:
                self._wake.wait_for(lambda: self._pending or self._stopping)
                if self._stopping:
                    return []
                until = time.monotonic() + self._patience
                while len(self._matching()) < self.batch_size and (left := until - time.monotonic()) > 0:
                    self._wake.wait(left)
                found = self._matching()
                for edit in found:
                    self._pending.remove(edit)
                # from here on their futures cannot cancel them; one may just have done so, without the lock
                batch = [edit for edit in found if edit.done.set_running_or_notify_cancel()]
            return batch

    def _matching(self) -> list[Edit]:
        """Return the oldest edit that waits and those that may run with it; forget those nobody waits for."""
        self._pending = deque(edit for edit in self._pending if not edit.done.cancelled())
        found = [edit for edit in self._pending if edit.key == self._pending[0].key]
        return found[: power_of_two(min(len(found), self.batch_size))]

    def _run(self, batch: list[Edit]) -> None:
        settings, start = batch[0].settings, time.monotonic()
        choice = merge_choice(self.pipe.choice, settings)
        steps = self.pipe.solver_steps(settings.count, settings.eta, choice, settings.conventions)
        for edit in batch:
            edit.steps = steps
        with memory_errors():
            output = self.pipe.edit(
                [edit.exemplar for edit in batch],
                [edit.image for edit in batch],
                [edit.mask for edit in batch],
                settings,
                generator=[torch.Generator().manual_seed(edit.settings.seed) for edit in batch],
                callback=_Watcher(self.pipe, batch),
            )
        flags = output.nsfw_content_detected or [False] * len(batch)
        for edit, image, flag in zip(batch, output.images, flags, strict=True):
            edit.done.set_result(Made(image, flag, len(batch)))
        several = GATHER * (time.monotonic() - start) if len(batch) > 1 else 0.0
        self._patience = min(several, MOST_PATIENCE)


def power_of_two(count: int) -> int:
    """Return the largest power of two up to ``count``, 0 for 0.

    Threads share out a batch of another size unevenly, and other numbers of threads do so, too (six of them a
    batch of four): then the last bits of an edit depend on its place.
    """
    return 1 << (count.bit_length() - 1) if count else 0


class _Watcher:
    """Counts the steps of a batch, and now and then shows where its edits are heading.

    Two neighbouring latents of a path without noise, x = a x_0 + s eps, give x_0 without another call of the
    network; a noisy path gives it roughly, which is enough to look at.
    """

    def __init__(self, pipe: PaintByExample, batch: list[Edit]) -> None:
        self.pipe = pipe
        self.batch = batch
        self._before: tuple[float, float, Tensor] | None = None
        self._last: Tensor | None = None
        self._next_preview = 0.0

    def __call__(self, step: int, timestep: float, latents: Tensor) -> None:
        if all(edit.cancelled for edit in self.batch):
            raise CancelledEdit
        for edit in self.batch:
            edit.step += 1
        level = torch.tensor([timestep])
        like = torch.zeros((), dtype=torch.float64)
        a, s = (float(x) for x in self.pipe.noise_schedule.signal_noise(level, like))
        ready = a > EARLY
        if (self.batch[0].settings.solver or self.pipe.solver) in SIGMA_SOLVERS:
            a, s = 1.0, s / a
        if self._last is not None:  # it lies at the level from which this step started
            now = (a, s, self._last)
            if self._before is not None and ready and time.monotonic() >= self._next_preview:
                self._show(self._before, now)
            self._before = now
        self._last = latents

    def _show(self, before: tuple[float, float, Tensor], now: tuple[float, float, Tensor]) -> None:
        watched = [index for index, edit in enumerate(self.batch) if edit.watched and not edit.cancelled]
        (a0, s0, x0), (a1, s1, x1) = before, now
        scale = s1 * a0 - s0 * a1
        if not watched or abs(scale) < 1e-6:
            return
        start = time.monotonic()
        estimate = ((s1 * x0 - s0 * x1) / scale)[watched].to(self.pipe.dtype)
        painted = self.pipe.model.decode_latents(estimate).float()
        pixels = ((painted / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
        for index, image in zip(watched, pixels.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            self.batch[index].preview = image
        now_is = time.monotonic()
        self._next_preview = now_is + (now_is - start) * (1.0 / PREVIEW_SHARE - 1.0)
