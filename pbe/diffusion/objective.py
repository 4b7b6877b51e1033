"""Training objective: noised latents, targets, weights and the dropping of the condition."""

from __future__ import annotations

import torch
from torch import Tensor

from pbe.diffusion.schedule import NoiseSchedule


def training_target(
    prediction: str, latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """Return what the network should predict, ``(b, c, h, w)``.

    Args:
        prediction: ``eps`` (DDPM, equation 14) or ``v`` (Salimans and Ho 2022, section 4).
        latents: clean latents.
        noise: the noise that was added.
        timesteps: ``(b,)``.
        schedule: the noise schedule.
    """
    if prediction == "eps":
        return noise
    signal, sigma = schedule.signal_noise(timesteps, latents)
    return signal * noise - sigma * latents


def loss_weights(
    weighting: str, prediction: str, timesteps: Tensor, schedule: NoiseSchedule, gamma: float = 5.0
) -> Tensor:
    """Return the weight of each sample's squared error, ``(b,)`` float32 on the device of ``timesteps``.

    ``min_snr`` (Hang et al. 2023, section 3.4) weighs the error of x_0 by ``min(SNR, gamma)``, which
    is ``min(SNR, gamma) / SNR`` on eps and ``min(SNR, gamma) / (SNR + 1)`` on v.
    """
    if weighting == "uniform":
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = schedule.snr(timesteps)
    divisor = snr if prediction == "eps" else snr + 1.0
    return (snr.clamp(max=gamma) / divisor).float().to(timesteps.device)


def per_sample_loss(output: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each sample, ``(b,)`` float32.

    Args:
        output: ``(b, c, h, w)``.
        target: ``(b, c, h, w)``.
        valid: ``(b, 1, h, w)`` in [0, 1]: how much each position counts; None counts all. A sample in which
            none counts (all of it padding) has a loss of 0.
    """
    error = (output.float() - target.float()) ** 2
    if valid is None:
        return error.mean(dim=(1, 2, 3))
    counted = valid.sum(dim=(1, 2, 3)) * error.shape[1]
    return (error * valid).sum(dim=(1, 2, 3)) / counted.clamp_min(torch.finfo(torch.float32).eps)


def drop_condition(condition: Tensor, null_condition: Tensor, drop: Tensor) -> Tensor:
    """Replace the condition of the samples marked in ``drop`` by the null condition.

    Args:
        condition: ``(b, tokens, c)``.
        null_condition: ``(b, tokens, c)``, expanded.
        drop: ``(b,)`` bool.
    """
    return torch.where(drop[:, None, None], null_condition.to(condition.dtype), condition)
