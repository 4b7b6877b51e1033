"""The noise schedule (Ho et al. 2020) in double precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pbe.config import ScheduleConfig


@dataclass(frozen=True)
class NoiseSchedule:
    """Cumulative signal shares of a discrete diffusion process.

    Attributes:
        betas: ``(T,)`` float64 noise variances.
        alphas_cumprod: ``(T,)`` float64 products of ``1 - beta``; entry t is the share of signal
            variance left at timestep t.
    """

    betas: Tensor
    alphas_cumprod: Tensor

    @property
    def timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.betas)

    def signal_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), shaped ``(b, 1, 1, 1)``, in the type of ``like``.

        Args:
            timesteps: ``(b,)``; between whole timesteps sqrt(1 / abar - 1) is interpolated.
            like: a tensor of the type and on the device to return.
        """
        alphas = self._alphas_at(timesteps.cpu()).view(-1, 1, 1, 1)
        return alphas.sqrt().to(like), (1.0 - alphas).sqrt().to(like)

    def _alphas_at(self, timesteps: Tensor) -> Tensor:
        """Return abar at whole or fractional timesteps, ``(b,)`` float64."""
        if not timesteps.is_floating_point():
            return self.alphas_cumprod[timesteps]
        below = timesteps.long().clamp(0, self.timesteps - 2)
        sigmas = (1.0 / self.alphas_cumprod - 1.0).sqrt()
        sigma = torch.lerp(sigmas[below], sigmas[below + 1], timesteps.double() - below)
        return 1.0 / (1.0 + sigma**2)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ``abar_t / (1 - abar_t)``, ``(b,)`` float64 on the CPU."""
        alphas = self.alphas_cumprod[timesteps.cpu()]
        return alphas / (1.0 - alphas)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return ``sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise`` (DDPM, equation 4); all ``(b, c, h, w)``."""
        signal, sigma = self.signal_noise(timesteps, latents)
        return signal * latents + sigma * noise


def make_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """Build the scaled-linear schedule: betas linear in their square roots, in float64."""
    roots = torch.linspace(
        config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64
    )
    betas = roots**2
    return NoiseSchedule(betas=betas, alphas_cumprod=torch.cumprod(1.0 - betas, dim=0))
