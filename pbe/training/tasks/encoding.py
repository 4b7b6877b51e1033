"""From a batch of uint8 images to the inputs of the UNet: latents, masks, exemplar features and random draws.

Every random draw of a training step is keyed by the global index of the sample. So it does not depend on
rank, worker, batch size, accumulation or restarts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbe.data.randomness import generator
from pbe.models.codec import Posterior, known_pixels
from pbe.models.latent_diffusion import LatentDiffusion, latent_mask, masked_image


@dataclass(frozen=True)
class EncodedBatch:
    """Output of the frozen networks for a batch, which is also what the latent cache stores.

    Attributes:
        image: posterior of the image, unscaled, ``(b, z, h, w)`` each.
        masked: posterior of the masked image.
        keep_mask: ``(b, 1, h, w)`` in [0, 1], 1 = keep.
        valid: ``(b, 1, h, w)`` in [0, 1], 0 = padding that the loss leaves out.
        features: ``(b, n, width)`` tower tokens of the exemplar.
        sample_index: ``(b,)`` global index of each sample.
    """

    image: Posterior
    masked: Posterior
    keep_mask: Tensor
    valid: Tensor
    features: Tensor
    sample_index: Tensor

    def to(self, device: torch.device) -> EncodedBatch:
        """Return the batch on ``device``; the sample indices stay on the CPU, where noise is drawn."""
        return EncodedBatch(
            image=Posterior(self.image.mean.to(device), self.image.std.to(device)),
            masked=Posterior(self.masked.mean.to(device), self.masked.std.to(device)),
            keep_mask=self.keep_mask.to(device),
            valid=self.valid.to(device),
            features=self.features.to(device),
            sample_index=self.sample_index,
        )


def to_pixels(images: Tensor) -> Tensor:
    """Map uint8 ``(b, 3, h, w)`` to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_keep_mask(mask: Tensor) -> Tensor:
    """Map a uint8 mask ``(b, 1, h, w)``, 255 = repaint, to float32 with 1 = keep, 0 = repaint."""
    return 1.0 - mask.float() / 255.0


def decoder_known_pixels(model: LatentDiffusion, batch: dict[str, Any]) -> Tensor | None:
    """Return what a mask-aware decoder sees of a batch, ``(b, 4, h, w)``; None for a plain decoder."""
    if not model.config.autoencoder.mask_aware_decoder:
        return None
    return known_pixels(to_pixels(batch["image"]), to_keep_mask(batch["mask"])).to(model.frozen_dtype)


@torch.no_grad()
def encode_batch(model: LatentDiffusion, batch: dict[str, Any]) -> EncodedBatch:
    """Run the frozen autoencoder and tower on a batch of the data module, on the model's device."""
    images, keep = to_pixels(batch["image"]), to_keep_mask(batch["mask"])
    pixels = torch.cat([images, masked_image(images, keep)]).to(model.frozen_dtype)
    both = model.autoencoder.encode(pixels)
    means, stds = both.mean.float().chunk(2), both.std.float().chunk(2)
    size = (means[0].shape[2], means[0].shape[3])
    return EncodedBatch(
        image=Posterior(means[0], stds[0]),
        masked=Posterior(means[1], stds[1]),
        keep_mask=latent_mask(keep, size),
        valid=latent_mask(batch["valid"].float() / 255.0, size),
        features=model.exemplar_encoder.features(model.normalise_exemplar(batch["exemplar"])).float(),
        sample_index=batch["sample_index"],
    )


@dataclass(frozen=True)
class Draws:
    """Random draws for a batch.

    Attributes:
        timesteps: ``(b,)`` int64, uniform over the schedule.
        drop: ``(b,)`` float64, uniform in [0, 1); the condition is dropped where it is below the probability.
        noise: ``(b, z, h, w)`` standard normal, added to the latents.
        image_noise: the same, for the posterior of the image.
        masked_noise: the same, for the posterior of the masked image.
    """

    timesteps: Tensor
    drop: Tensor
    noise: Tensor
    image_noise: Tensor
    masked_noise: Tensor


def draw(
    seed: int, sample_index: Tensor, shape: tuple[int, int, int], timesteps: int, stream: str = "train"
) -> Draws:
    """Make the random draws of each sample, by its global index in ``sample_index`` ``(b,)``, on the CPU.

    ``shape`` is that of the latents ``(z, h, w)``, ``timesteps`` the length T of the schedule; draws for
    different ``stream`` names are independent.
    """
    steps, drops, normals = [], [], []
    for index in sample_index.tolist():
        rng = generator(seed, "diffusion", stream, int(index))
        steps.append(int(rng.integers(timesteps)))
        drops.append(float(rng.random()))
        normals.append(rng.standard_normal((3, *shape), dtype=np.float32))
    noise, image_noise, masked_noise = torch.from_numpy(np.stack(normals, axis=1)).unbind(0)
    return Draws(
        torch.tensor(steps), torch.tensor(drops, dtype=torch.float64), noise, image_noise, masked_noise
    )


def batch_drop(seed: int, optimizer_step: int) -> float:
    """Draw the uniform number that decides for the whole batch of an optimizer step, as the original does."""
    return float(generator(seed, "diffusion", "batch_drop", optimizer_step).random())
