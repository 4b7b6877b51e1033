"""Lightning callbacks that show how training goes: rows of the log, and pictures."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from pbe.data.datamodule import TrainingData
from pbe.training.monitoring.sample_grids import GridSource
from pbe.training.optimization.non_finite import sample_indices
from pbe.training.resume.callback import ends_step
from pbe.training.tasks.base import BaseTask


class StepLog(pl.Callback):
    """Hands what a training step logged to the loggers, before the checkpoint of that step is written.

    Lightning would do it after the checkpoint, so that a process killed in between would lose the row.

    Args:
        every: optimizer steps between rows, which show means over all samples since the last one.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._begun = 0.0
        self._restart(0.0)

    def _restart(self, waited: float) -> None:
        self._busy, self._samples, self._steps = 0.0, 0, 0
        self._waited, self._since = waited, time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        self._restart(_waited(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note when the batch came."""
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log under the number of the optimizer step that was just made."""
        self._busy += time.perf_counter() - self._begun
        self._samples += len(sample_indices(batch)) * trainer.world_size
        if not ends_step(trainer, batch_idx):
            return
        self._steps += 1
        if trainer.global_step % self.every:
            return
        assert isinstance(pl_module, BaseTask)
        values = pl_module.sums.means() | {"train/learning_rate": pl_module.rate} | self._speed(trainer)
        pl_module.sums.clear()
        self._restart(_waited(trainer))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _speed(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return what the last steps cost; validations and checkpoints count for the time left only."""
        waited = _waited(trainer) - self._waited
        total = max(self._busy + waited, 1e-9)
        step_seconds = (time.perf_counter() - self._since) / self._steps
        return {
            "system/samples_per_second": self._samples / total,
            "system/data_wait_share": waited / total,
            "system/memory_gb": peak_memory() / 1e9,
            "system/hours_left": step_seconds * (trainer.max_steps - trainer.global_step) / 3600,
        }


def _waited(trainer: pl.Trainer) -> float:
    data = getattr(trainer, "datamodule", None)
    return data.waited if isinstance(data, TrainingData) else 0.0


def peak_memory() -> int:
    """Return the most bytes that were ever in use: of the GPU, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
        assert isinstance(module, BaseTask)
        if not trainer.is_global_zero and not module.sharded:
            return
        training = module.training
        module.eval()
        grid = self.source(module)  # by all ranks where each has a share of the weights
        module.train(training)
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(grid)
        picture.save(self.folder / f"step{self._last:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [picture], step=self._last)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, self._last, dataformats="HWC")
