"""Lightning callbacks: stopping by signal without loss, and pictures of how training goes."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from pbe.training.base_task import BaseTask
from pbe.training.grids import GridSource

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(pl.Callback):
    """Ctrl-C and SIGTERM end training after the current batch, with a checkpoint; a second one at once.

    Args:
        checkpoint: path that the checkpoint gets.

    Attributes:
        received: the signal's number, or 0.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received = 0
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals; Lightning has put its own handlers by now."""
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask Lightning to stop when a signal has come."""
        if self.received:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, and give the signals back."""
        if self.received:
            trainer.save_checkpoint(self.checkpoint)
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


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
        if trainer.global_step % self.every == 0 and trainer.global_step != self._last:
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
