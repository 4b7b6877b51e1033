"""Lightning callbacks that log the progress of training: rows of the log, and grids of samples.

Grids show fixed exemplars at fixed noise, drawn on the averaged weights.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from einops import rearrange
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.nn import functional as F

from pbe.config import Config
from pbe.data.datamodule import TrainingData
from pbe.data.dataset import collate, describe
from pbe.diffusion.solvers import lcm, plms
from pbe.editing.engine import Conditioning, noise_predictor
from pbe.errors import UserError
from pbe.models.latent_diffusion import masked_image
from pbe.training.optimization.non_finite import sample_indices
from pbe.training.resume.callback import ends_step
from pbe.training.tasks.autoencoder import AutoencoderTask
from pbe.training.tasks.base import BaseTask
from pbe.training.tasks.diffusion import DiffusionTask
from pbe.training.tasks.encoding import decoder_known_pixels, draw, encode_batch, to_keep_mask, to_pixels

GridSource = Callable[[BaseTask], np.ndarray]


class StepLog(pl.Callback):
    """Passes the values of a training step to the loggers, before the checkpoint of that step is written.

    Lightning would do it after the checkpoint, so that a process killed in between would lose the row. A row
    comes after ``every`` optimizer steps and shows means over all samples since the last one.
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
    return process_peak()


def process_peak() -> int:
    """Return the most bytes of memory that this process ever held."""
    status = Path("/proc/self/status")  # getrusage counts what the process held that started this one
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class GridCallback(pl.Callback):
    """Draws a sample grid after every ``every`` steps, into the run's ``grids/`` and to the loggers."""

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
        image = Image.fromarray(grid)
        image.save(self.folder / f"step{self._last:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [image], step=self._last)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, self._last, dataformats="HWC")


def fixed_samples(config: Config, count: int) -> dict[str, Any]:
    """Return the first samples of the validation set (else of the training set) as one batch."""
    stream = "validation" if config.data.validation_shards else "train"
    dataset = TrainingData(config).dataset(stream)
    batch = collate([dataset[index] for index in range(min(count, len(dataset)))])
    if "image" not in batch:
        raise UserError(
            f"none of the first {stream} images can be used for the sample grid "
            f"({describe(batch['counts'])}); check the shards, data.min_box_area and data.max_box_area"
        )
    return batch


def to_uint8(images: Tensor) -> np.ndarray:
    """Map images ``(b, 3, h, w)`` in [-1, 1] to uint8 ``(b, h, w, 3)``, clipped and rounded."""
    pixels = ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return rearrange(pixels, "b c h w -> b h w c").cpu().numpy()


def tile(columns: list[np.ndarray]) -> np.ndarray:
    """Lay columns ``(b, h, w, 3)`` side by side, a row for each sample, with 2 px of white between."""
    padded = [np.pad(c, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for c in columns]
    return rearrange(np.stack(padded), "column row h w c -> (row h) (column w) c")


def diffusion_grid(config: Config) -> GridSource:
    """Return the source of grids: source, masked, exemplar, and the edit at each guidance scale."""
    batch = fixed_samples(config, config.logging.grid_samples)

    @torch.no_grad()
    def make(task: BaseTask) -> np.ndarray:
        assert isinstance(task, DiffusionTask)
        moved = {k: v.to(task.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        images, keep = to_pixels(moved["image"]), to_keep_mask(moved["mask"])
        exemplar = F.interpolate(moved["exemplar"].float() / 127.5 - 1.0, images.shape[-2:], mode="area")
        columns = [images, masked_image(images, keep), exemplar]
        with task.averaged_weights():
            columns += _edits(task, moved, config)
        return tile([to_uint8(column) for column in columns])

    return make


def _edits(task: DiffusionTask, batch: dict[str, Any], config: Config) -> list[Tensor]:
    encoded, model = encode_batch(task.model, batch), task.model
    shape = tuple(encoded.image.mean.shape[1:])
    draws = draw(config.seed, batch["sample_index"].cpu(), shape, task.schedule.timesteps, "grid")  # type: ignore[arg-type]
    noise = draws.noise.to(task.device, model.dtype)
    masked = (encoded.masked.mean * config.model.autoencoder.scale_factor).to(model.dtype)
    condition = model.exemplar_encoder.condition(encoded.features.to(model.dtype))
    conditioning = Conditioning(condition, masked, encoded.keep_mask.to(model.dtype))
    edits, scales, few = [], config.logging.grid_guidance, model.config.unet.few_steps
    if few:  # scales that it was not trained for would show nothing of it
        low, high = model.config.unet.guidance_range
        scales = sorted({min(max(scale, low), high) for scale in scales})
    for scale in scales:
        predict = noise_predictor(model, task.schedule, conditioning, scale)
        solver, steps = (lcm, few) if few else (plms, config.logging.grid_steps)
        latents = solver(predict, noise, task.schedule, steps)
        known = decoder_known_pixels(model, batch)
        edits.append(model.decode_latents(latents.to(model.frozen_dtype), known))
    return edits


def autoencoder_grid(config: Config) -> GridSource:
    """Return the source of grids: images and their reconstructions."""
    batch = fixed_samples(config, config.logging.grid_samples)

    @torch.no_grad()
    def make(task: BaseTask) -> np.ndarray:
        assert isinstance(task, AutoencoderTask)
        moved = {key: batch[key].to(task.device) for key in ("image", "mask")}
        images, known = to_pixels(moved["image"]), decoder_known_pixels(task.model, moved)
        with task.averaged_weights():
            latents = task.model.autoencoder.encode(images.to(task.model.dtype)).mean
            decoded = task.model.autoencoder.decode(latents, known)
        return tile([to_uint8(images), to_uint8(decoded)])

    return make
