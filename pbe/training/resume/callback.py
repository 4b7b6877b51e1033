"""Lightning callback that saves checkpoints, keeps some of them, and ends training at a signal."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from pbe.config import TrainerConfig
from pbe.files import atomic_write
from pbe.training.resume.files import LAST_NAME, SafeCheckpointIO, candidates, duplicate, remove
from pbe.training.resume.signals import StopSignals

LOG = logging.getLogger(__name__)

BEST_NAME, BEST_NOTE = "best.ckpt", "best.json"


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether this micro-batch is the last one of an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


class Checkpoints(pl.callbacks.Checkpoint):
    """Writes ``last.ckpt`` and keeps others, always between two whole optimizer steps.

    A signal ends training as soon as the step it came in is made, its checkpoint written and whatever
    is due at that step logged; a signal to one rank ends all. ``tried`` is the optimizer step of the last
    checkpoint, written or not for want of room; -1 before any.
    """

    def __init__(
        self, folder: Path, options: TrainerConfig, stop: StopSignals, writer: SafeCheckpointIO
    ) -> None:
        self.folder, self.options, self.stop, self.writer = folder, options, stop, writer
        self._saved = self.tried = -1
        self._clock = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals back from Lightning, which has installed its own handlers by now."""
        self.stop.take_over()
        self._clock = time.monotonic()
        if trainer.is_global_zero and trainer.global_step == 0:  # a new start has no best yet
            remove(self.folder / BEST_NAME)
            (self.folder / BEST_NOTE).unlink(missing_ok=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take them back where several ranks validate: Lightning's handler broadcasts, wherever they are."""
        if trainer.world_size > 1:
            self.stop.take_over()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End training when a signal came and the last step is complete."""
        # saving and validating take a while, in which a signal may have come to one rank alone
        if self.tried == trainer.global_step and self._agree(trainer)[0]:
            self.stop.check()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when a step is complete and one is due, the last step is made, or a signal came."""
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        stopped, late = self._agree(trainer)
        periodic = late or step % self.options.checkpoint_every == 0
        # the best is known after the validation, and the checkpoint has to be there by then
        may_be_best = self.options.keep_best and step % self.options.validate_every == 0
        if periodic or may_be_best or stopped or step == trainer.max_steps:
            self._save(trainer, step, periodic)

    def _agree(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Return whether any rank was stopped and whether minutes are up on any; the same on all ranks."""
        minutes = self.options.checkpoint_minutes
        late = 0 < minutes * 60 <= time.monotonic() - self._clock
        if trainer.world_size == 1:
            return bool(self.stop.received), late
        agree = trainer.strategy.reduce_boolean_decision
        if not agree(bool(self.stop.received) or late, all=False):
            return False, False
        stopped = agree(bool(self.stop.received), all=False)
        if stopped and not self.stop.received:
            self.stop.received = signal.SIGTERM
        return stopped, agree(late, all=False)

    def _save(self, trainer: pl.Trainer, step: int, periodic: bool) -> None:
        last = self.folder / LAST_NAME
        trainer.save_checkpoint(last, weights_only=False)
        self.tried, self._clock = step, time.monotonic()
        if self.writer.error is not None:
            self._report_failure(step, self.writer.error)
            return
        self._saved = step
        if periodic and trainer.is_global_zero and (self.options.keep_checkpoints or self.options.keep_every):
            try:
                self._keep(last, step)
            except OSError as error:
                self._report_failure(step, error)

    def _report_failure(self, step: int, error: OSError) -> None:
        older = f"that of step {self._saved} is" if self._saved >= 0 else "older ones are"
        LOG.error(
            "could not save the checkpoint of step %d: %s; %s as it was, and training goes on: "
            "make room in '%s'", step, error.strerror or error, older, self.folder,
        )  # fmt: skip

    def _keep(self, last: Path, step: int) -> None:
        duplicate(last, self.folder / f"step={step:07d}.ckpt")
        kept, every = self.options.keep_checkpoints, self.options.keep_every
        if kept < 0:
            return
        steps = {path: int(path.stem.removeprefix("step=")) for path in candidates(self.folder)[1:]}
        temporary = [path for path, made in steps.items() if not every or made % every]
        for path in temporary[kept:]:
            remove(path)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call the checkpoint of this step the best one when its validation loss is the lowest so far."""
        value, note = trainer.callback_metrics.get("val/loss"), self.folder / BEST_NOTE
        if not self.options.keep_best or not trainer.is_global_zero or value is None:
            return
        if self._saved != trainer.global_step or not math.isfinite(value):
            return
        if note.is_file() and json.loads(note.read_text())["val/loss"] <= float(value):
            return
        try:
            duplicate(self.folder / LAST_NAME, self.folder / BEST_NAME)
            atomic_write(note, json.dumps({"step": self._saved, "val/loss": float(value)}))
        except OSError as error:
            self._report_failure(self._saved, error)
