"""Classifier-free guidance (Ho and Salimans 2022) and the step from network output to noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pbe.diffusion.schedule import NoiseSchedule

PredictNoise = Callable[[Tensor, Tensor], Tensor]
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
Interval = tuple[float, float]
"""Lowest and highest noise level, as shares of the schedule: 0 is clean, 1 is noise."""
EVERYWHERE: Interval = (0.0, 1.0)


def guided(
    network: Network, condition: Tensor, null_condition: Tensor, guidance_scale: float | Tensor
) -> PredictNoise:
    """Return a network with its condition fixed and classifier-free guidance applied.

    Both branches run in one call, the null condition first. Without guidance (scale 1) only the
    conditional branch runs.

    Args:
        network: ``network(x_t, timesteps, condition)``; it must accept the doubled batch.
        condition: ``(b, tokens, c)``.
        null_condition: the same shape.
        guidance_scale: s in ``e_null + s (e_cond - e_null)``; 1 turns guidance off. A tensor ``(b, 1, 1, 1)``
            gives each sample its own, and both branches always run.
    """
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 1.0:
        return lambda x_t, timesteps: network(x_t, timesteps, condition)
    both = torch.cat([null_condition, condition])

    def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
        output = network(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both)
        null, conditional = output.chunk(2)
        return null + guidance_scale * (conditional - null)

    return predict


def guided_in(
    interval: Interval, inside: PredictNoise, outside: PredictNoise, timesteps: Sequence[float], last: int
) -> PredictNoise:
    """Guide only within an interval of noise levels (Kynkäänniemi et al. 2024); other calls cost half.

    Args:
        interval: noise levels that are guided, both ends included.
        inside: the guided predictor.
        outside: the predictor of the conditional branch alone.
        timesteps: of all calls to come, in order, so that the host need not wait for the device to know them.
        last: timestep of pure noise.
    """
    low, high = interval
    plan = iter([low * last <= timestep <= high * last for timestep in timesteps])
    return lambda x_t, timesteps: (inside if next(plan) else outside)(x_t, timesteps)


def noise_from_v(predict_v: PredictNoise, schedule: NoiseSchedule) -> PredictNoise:
    """Turn a predictor of ``v = sqrt(abar) e - sqrt(1 - abar) x_0`` into one of the noise ``e``."""

    def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
        signal, sigma = schedule.signal_noise(timesteps, x_t)
        return signal * predict_v(x_t, timesteps) + sigma * x_t

    return predict
