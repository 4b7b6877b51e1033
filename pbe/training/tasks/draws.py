"""Every random draw of a training step, keyed by the global index of the sample.

Rank, worker, batch size, accumulation and restarts have no part in the keys, so they change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pbe.data.randomness import generator


@dataclass(frozen=True)
class Draws:
    """Draws for a batch.

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
    """Draw for each sample on the CPU.

    Args:
        seed: of the run.
        sample_index: ``(b,)`` global index of each sample.
        shape: ``(z, h, w)`` of the latents.
        timesteps: length T of the schedule.
        stream: name of the purpose; streams are independent.
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
    """Draw the one uniform number that decides over the whole batch of an optimizer step."""
    return float(generator(seed, "diffusion", "batch_drop", optimizer_step).random())
