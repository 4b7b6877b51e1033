"""Solvers of the reverse process, as flat functions with one signature.

``solver(predict_noise, x_T, schedule, steps, *, eta, generator, callback) -> x_0``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pbe.diffusion.guidance import PredictNoise
from pbe.diffusion.schedule import NoiseSchedule
from pbe.errors import UserError

Callback = Callable[[int, int, Tensor], None]


class Solver(Protocol):
    """The signature that every solver has."""

    def __call__(
        self,
        predict_noise: PredictNoise,
        x_T: Tensor,
        schedule: NoiseSchedule,
        steps: int,
        *,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Integrate from noise ``x_T`` (b, c, h, w) to latents.

        Args:
            predict_noise: ``predict_noise(x_t, timesteps (b,))``.
            x_T: standard normal start.
            schedule: noise schedule.
            steps: number of steps asked for; see :func:`uniform_timesteps` for how many are made.
            eta: share of ancestral noise, 0 (deterministic) to 1 (DDPM); DDIM only.
            generator: CPU generator of that noise.
            callback: called with (index of the step, timestep, x after it).
        """
        ...


def uniform_timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Return the original's timesteps, ascending: ``range(0, T, T // steps)`` plus one.

    When ``steps`` does not divide T there are a few more than asked for (30 gives 31).

    Raises:
        UserError: ``steps`` outside 1..T/2 (a stride of one would leave the schedule's range).
    """
    limit = schedule.timesteps // 2
    if not 1 <= steps <= limit:
        raise UserError(f"number of steps is {steps}; it must lie between 1 and {limit}")
    return [t + 1 for t in range(0, schedule.timesteps - 1, schedule.timesteps // steps)]


def _alphas(schedule: NoiseSchedule, timesteps: list[int]) -> tuple[list[float], list[float]]:
    """Return abar at each timestep and at the one that follows it in sampling; the last ends at abar_0."""
    now = [float(schedule.alphas_cumprod[t]) for t in timesteps]
    return now, [float(schedule.alphas_cumprod[0]), *now[:-1]]


def _ddim_step(
    x: Tensor, noise: Tensor, alpha: float, alpha_next: float, sigma: float = 0.0, fresh: Tensor | None = None
) -> Tensor:
    """One step of DDIM (Song et al. 2021, equation 12)."""
    x_0 = (x - (1.0 - alpha) ** 0.5 * noise) / alpha**0.5
    direction = max(1.0 - alpha_next - sigma**2, 0.0) ** 0.5 * noise
    x = alpha_next**0.5 * x_0 + direction
    return x if fresh is None else x + sigma * fresh


def ddim(
    predict_noise: PredictNoise,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with DDIM (Song et al. 2021); see :class:`Solver` for the arguments."""
    timesteps = uniform_timesteps(schedule, steps)
    alphas, alphas_next = _alphas(schedule, timesteps)
    x = x_T
    for index in reversed(range(len(timesteps))):
        alpha, alpha_next = alphas[index], alphas_next[index]
        noise = predict_noise(x, _batch(x, timesteps[index]))
        # equation 16: eta = 1 is the variance of the DDPM posterior
        sigma = eta * ((1.0 - alpha_next) / (1.0 - alpha) * (1.0 - alpha / alpha_next)) ** 0.5
        fresh = torch.randn(x.shape, generator=generator).to(x) if eta else None
        x = _ddim_step(x, noise, alpha, alpha_next, sigma, fresh)
        if callback is not None:
            callback(len(timesteps) - 1 - index, timesteps[index], x)
    return x


def plms(
    predict_noise: PredictNoise,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with PLMS, the linear multistep solver of PNDM (Liu et al. 2022), as the original does.

    The first step is a Heun step; then Adams-Bashforth of order 2, 3 and 4 on the noise. One more
    network call than there are steps. See :class:`Solver` for the arguments.

    Raises:
        UserError: ``eta`` is not 0.
    """
    if eta:
        raise UserError("plms is deterministic: eta must be 0 (use ddim for eta above 0)")
    timesteps = uniform_timesteps(schedule, steps)
    alphas, alphas_next = _alphas(schedule, timesteps)
    x = x_T
    history: list[Tensor] = []
    for index in reversed(range(len(timesteps))):
        alpha, alpha_next = alphas[index], alphas_next[index]
        noise = predict_noise(x, _batch(x, timesteps[index]))
        if history:
            combined = _adams_bashforth([noise, *history])
        else:
            ahead = _ddim_step(x, noise, alpha, alpha_next)
            combined = 0.5 * (noise + predict_noise(ahead, _batch(x, timesteps[max(index - 1, 0)])))
        history = [noise, *history][:3]
        x = _ddim_step(x, combined, alpha, alpha_next)
        if callback is not None:
            callback(len(timesteps) - 1 - index, timesteps[index], x)
    return x


ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _adams_bashforth(noises: list[Tensor]) -> Tensor:
    """Combine noise predictions, newest first, by the Adams-Bashforth weights of their number."""
    weights = ADAMS_BASHFORTH[len(noises)]
    return sum(
        (weight * noise for weight, noise in zip(weights, noises, strict=True)), torch.zeros_like(noises[0])
    )


def _batch(x: Tensor, timestep: int) -> Tensor:
    return torch.full((x.shape[0],), timestep, device=x.device, dtype=torch.long)


SOLVERS: dict[str, Solver] = {"plms": plms, "ddim": ddim}


def get_solver(name: str) -> Solver:
    """Return the solver of that name.

    Raises:
        UserError: there is none; the line lists those there are.
    """
    if name not in SOLVERS:
        raise UserError(f"no solver '{name}'; there are: {', '.join(SOLVERS)}")
    return SOLVERS[name]
