"""Sample grids of a run at fixed exemplars and fixed noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pbe.config import Config
from pbe.data.datamodule import TrainingData
from pbe.data.dataset import collate, describe
from pbe.diffusion.solvers import plms
from pbe.editing.engine import Conditioning, noise_predictor
from pbe.errors import UserError
from pbe.models.latent_diffusion import masked_image
from pbe.training.tasks.autoencoder import AutoencoderTask
from pbe.training.tasks.base import BaseTask
from pbe.training.tasks.diffusion import DiffusionTask
from pbe.training.tasks.draws import draw
from pbe.training.tasks.encoding import decoder_known_pixels, encode_batch, to_keep_mask, to_pixels

GridSource = Callable[[BaseTask], np.ndarray]


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
        device = task.device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
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
    edits = []
    for scale in config.logging.grid_guidance:
        predict = noise_predictor(model, task.schedule, conditioning, scale)
        latents = plms(predict, noise, task.schedule, config.logging.grid_steps)
        known = decoder_known_pixels(model, batch)
        edits.append(model.decode_latents(latents.to(model.frozen_dtype), known))
    return edits


def autoencoder_grid(config: Config) -> GridSource:
    """Return the source of grids: images and their reconstructions."""
    batch = fixed_samples(config, config.logging.grid_samples)

    @torch.no_grad()
    def make(task: BaseTask) -> np.ndarray:
        assert isinstance(task, AutoencoderTask)
        images = to_pixels(batch["image"].to(task.device))
        with task.averaged_weights():
            known = decoder_known_pixels(
                task.model, {key: batch[key].to(task.device) for key in ("image", "mask")}
            )
            latents = task.model.autoencoder.encode(images.to(task.model.dtype)).mean
            decoded = task.model.autoencoder.decode(latents, known)
        return tile([to_uint8(images), to_uint8(decoded)])

    return make
