"""What an original checkpoint holds besides weights, all of which follows from the configuration."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pbe.checkpoints.clip import POSITION_IDS
from pbe.checkpoints.compvis.names import TOWER
from pbe.checkpoints.tensors import Lazies, lazies
from pbe.config import ScheduleConfig
from pbe.errors import UserError


def schedule_buffers(schedule: ScheduleConfig) -> dict[str, Tensor]:
    """Return the twelve vectors of an original checkpoint that follow from its schedule, float32.

    Computed in float64 in the original's order of operations, so that they come out the same to the bit.
    """
    start, end = schedule.beta_start**0.5, schedule.beta_end**0.5
    betas = torch.linspace(start, end, schedule.timesteps, dtype=torch.float64).square().numpy()
    alphas = 1.0 - betas
    product = np.cumprod(alphas, axis=0)
    previous = np.append(1.0, product[:-1])
    variance = betas * (1.0 - previous) / (1.0 - product)
    buffers = {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(product),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - product),
        "log_one_minus_alphas_cumprod": np.log(1.0 - product),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / product),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / product - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - product),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(alphas) / (1.0 - product),
    }
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in buffers.items()}


BUFFERS = tuple(schedule_buffers(ScheduleConfig(timesteps=2)))


def derived(schedule: ScheduleConfig, positions: int) -> Lazies:
    """Return what an original checkpoint holds besides weights: schedule buffers and position indices."""
    indices = {TOWER + POSITION_IDS: torch.arange(positions)[None]}
    return lazies(schedule_buffers(schedule) | indices)


def check_schedule(tensors: Lazies, schedule: ScheduleConfig, source: str) -> None:
    """Compare the betas in a checkpoint, where it has them, with the schedule of the configuration."""
    given = next((tensor for key, tensor in tensors.items() if key.rpartition(".")[2] == "betas"), None)
    if given is None:
        return
    found, wanted = given.read().float().flatten(), schedule_buffers(schedule)["betas"]
    first, last = (found[place].sum() for place in (slice(1), slice(-1, None)))
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=5e-3, atol=0.0):
        raise UserError(
            f"{source}: trained with another noise schedule ({len(found)} timesteps, betas {first:.6g} to "
            f"{last:.6g}) than the configuration says; give the one it was trained with"
        )
