"""Lightning callbacks: checkpoints, stopping by signal without loss, and pictures of how training goes."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from pbe.training.base_task import BaseTask
from pbe.training.grids import GridSource

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(Exception):  # noqa: N818 - a way out, not an error
    """Training ends early because a signal came; its checkpoint is written."""


class StopSignals:
    """Remembers that Ctrl-C or SIGTERM came; a second signal interrupts at once.

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

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside a ``with`` block."""
        previous = self.take_over()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Checkpoints(pl.callbacks.Checkpoint):
    """Writes ``last.ckpt``, and keeps the latest periodic ones, always between two whole optimizer steps.

    A signal ends training as soon as the step it came in is made, its checkpoint written and whatever
    is due at that step logged.

    Args:
        folder: for the checkpoints.
        every: optimizer steps between them.
        keep: how many besides ``last.ckpt`` stay; -1 keeps all.
        stop: says whether a signal came.
    """

    def __init__(self, folder: Path, every: int, keep: int, stop: StopSignals) -> None:
        self.folder, self.every, self.keep, self.stop = folder, every, keep, stop
        self._saved = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals back from Lightning, which has put its own handlers by now."""
        self.stop.take_over()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End training when a signal came and the checkpoint of the last step is there."""
        if self.stop.received and self._saved == trainer.global_step:
            raise TrainingStopped

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when a step is complete and one is due, the last step is made, or a signal came."""
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        due = step % self.every == 0
        if due or self.stop.received or step == trainer.max_steps:
            last = self.folder / "last.ckpt"
            trainer.save_checkpoint(last, weights_only=False)
            self._saved = step
            if due and self.keep and trainer.is_global_zero:
                self._keep(last, step)

    def _keep(self, last: Path, step: int) -> None:
        temporary = self.folder / ".copy.tmp"
        shutil.copyfile(last, temporary)
        temporary.replace(self.folder / f"step={step:07d}.ckpt")
        kept = sorted(self.folder.glob("step=*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        for path in kept[: -self.keep] if self.keep > 0 else []:
            path.unlink()


class StepLog(pl.Callback):
    """Hands what a training step logged to the loggers, before the checkpoint of that step is written.

    Lightning would do it after the checkpoint, so that a process killed in between would lose the row.

    Args:
        every: optimizer steps between rows; with accumulation they show the step's last micro-batch.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log under the number of the optimizer step that was just made."""
        if not ends_step(trainer, batch_idx) or trainer.global_step % self.every:
            return
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Say whether this micro-batch was the last one of an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


class GridCallback(pl.Callback):
    """Draws a sample grid every so many steps, into ``grids/`` and to Weights & Biases.

    Args:
        source: draws the picture of a task.
        folder: of the run.
        every: steps between grids.
    """

    def __init__(self, source: GridSource, folder: Path, every: int) -> None:
        self.source, self.folder, self.every = source, folder / "grids", every
        self._last = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when the step is due (once, however many micro-batches it has)."""
        if ends_step(trainer, batch_idx) and trainer.global_step % self.every == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last grid."""
        if trainer.global_step != self._last:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._last = trainer.global_step
        if not trainer.is_global_zero:
            return
        assert isinstance(module, BaseTask)
        training = module.training
        module.eval()
        grid = self.source(module)
        module.train(training)
        self.folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(grid)
        picture.save(self.folder / f"step{self._last:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [picture], step=self._last)
