"""DDIM, its form for models of few steps, and the multistep solvers built on its step: PLMS and PNDM."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers.grid import Grid, log_snr_grid, spaced_timesteps, strided, strided_grid
from pbe.diffusion.solvers.registry import Run, solver, weighted
from pbe.diffusion.solvers.settings import SolverChoice
from pbe.errors import UserError

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


@solver(strided_grid, "uniform", noise="eta", karras=False)
def ddim(run: Run, x: Tensor) -> Tensor:
    """Denoising diffusion implicit models (Song et al. 2021)."""
    levels = zip(run.grid.alphas, run.grid.alphas_next, strict=True)
    for index, (alpha, alpha_next) in enumerate(levels):
        noise = run.noise(x, index)
        # equation 16: eta = 1 is the variance of the DDPM posterior
        sigma = run.eta * ((1.0 - alpha_next) / (1.0 - alpha) * (1.0 - alpha / alpha_next)) ** 0.5
        x = _ddim_step(x, noise, alpha, alpha_next, sigma, run.settings.clip)
        if run.eta:
            x = x + sigma * run.fresh(x, index)
        run.report(index, x)
    return x


@solver(log_snr_grid, "trailing", noise="eta", karras=False)
def lcm(run: Run, x: Tensor) -> Tensor:
    """The steps of a distilled model: to the clean latents that it predicts, and back to the next level.

    With ``eta`` 0 back along the predicted noise, which is DDIM's step without its rounding of levels; with 1
    along fresh noise, as for consistency models (Song et al. 2023, algorithm 1; Luo et al. 2023, algorithm
    3); between them along a mixture of the same variance.
    """
    levels = zip(run.grid.alphas, run.grid.alphas_next, strict=True)
    for index, (alpha, alpha_next) in enumerate(levels):
        noise = run.noise(x, index)
        x_0 = (x - (1.0 - alpha) ** 0.5 * noise) / alpha**0.5
        if run.eta and alpha_next < 1.0:
            noise = (1.0 - run.eta**2) ** 0.5 * noise + run.eta * run.fresh(x, index)
        x = alpha_next**0.5 * x_0 + (1.0 - alpha_next) ** 0.5 * noise
        run.report(index, x)
    return x


@solver(strided_grid, "uniform", karras=False)
def plms(run: Run, x: Tensor) -> Tensor:
    """PLMS, the linear multistep solver of PNDM (Liu et al. 2022), as the original does it.

    The first step is a Heun step; then Adams-Bashforth of order 2, 3 and 4 on the noise. One more network
    call than there are steps.
    """
    history: list[Tensor] = []
    levels = zip(run.grid.alphas, run.grid.alphas_next, strict=True)
    for index, (alpha, alpha_next) in enumerate(levels):
        noise = run.noise(x, index)
        history = [noise, *history][:4]
        combined = weighted(ADAMS_BASHFORTH[len(history)], history)
        if index == 0:
            ahead = _ddim_step(x, noise, alpha, alpha_next)
            combined = 0.5 * (noise + run.noise(ahead, min(1, len(run.grid) - 1)))
        x = _ddim_step(x, combined, alpha, alpha_next)
        run.report(index, x)
    return x


def _pndm_grid(schedule: NoiseSchedule, steps: int, settings: SolverChoice) -> Grid:
    """Lay out PNDM, with a level for each network call: the steps of the start take more than one."""
    timesteps = [round(t) for t in spaced_timesteps(schedule, steps, settings)]
    stride = schedule.timesteps // steps
    starts, asked, targets = list(timesteps), list(timesteps), [t - stride for t in timesteps]
    if settings.runge_kutta:
        return _runge_kutta_grid(schedule, settings, timesteps, stride)
    if len(timesteps) > 1:
        second = timesteps[1]
        starts.insert(1, second + stride)
        asked.insert(1, second)
        targets.insert(1, second)
    return replace(strided(schedule, settings, starts, targets), timesteps=tuple(asked))


def _runge_kutta_grid(
    schedule: NoiseSchedule, settings: SolverChoice, timesteps: list[int], stride: int
) -> Grid:
    if len(timesteps) < 4:
        raise UserError(f"number of steps is {len(timesteps)}; PNDM with Runge-Kutta steps needs at least 4")
    starts, asked, targets = [], [], []
    for start, after in pairwise(timesteps[:4]):
        middle = after + stride // 2
        starts += [start] * 4
        asked += [start, middle, middle, after]
        targets += [start - stride // 2, middle, middle - stride // 2, after]
    rest = timesteps[3:]
    grid = strided(schedule, settings, starts + rest, targets + [t - stride for t in rest])
    return replace(grid, timesteps=tuple(asked + rest))


@solver(_pndm_grid, "leading", karras=False)
def pndm(run: Run, x: Tensor) -> Tensor:
    """PNDM (Liu et al. 2022) in the form of diffusers; the callback sees what every network call led to.

    By default the first step is a Heun step, which makes this :func:`plms`; with ``runge_kutta`` in the
    settings the first three are pseudo Runge-Kutta steps.
    """
    warm_up = 12 if run.settings.runge_kutta else min(2, len(run.grid))
    history: list[Tensor] = []
    noises: list[Tensor] = []
    start = x
    levels = zip(run.grid.alphas, run.grid.alphas_next, strict=True)
    for index, (alpha, alpha_next) in enumerate(levels):
        noise = run.noise(x, index)
        if index < warm_up:
            stage = index % (4 if run.settings.runge_kutta else 2)
            noises, start = ([noise], x) if stage == 0 else ([*noises, noise], start)
            history = [noise, *history][:4] if stage == 0 else history
            combined = _warm_up(noises, run.settings.runge_kutta)
            x = _ddim_step(start, combined, alpha, alpha_next)
        else:
            history = [noise, *history][:4]
            x = _ddim_step(x, weighted(ADAMS_BASHFORTH[len(history)], history), alpha, alpha_next)
        run.report(index, x)
    return x


def _warm_up(noises: list[Tensor], runge_kutta: bool) -> Tensor:
    """Return the noise to step with after so many calls of a first step."""
    if runge_kutta:
        return weighted(RUNGE_KUTTA, noises) if len(noises) == 4 else noises[-1]
    return weighted((1 / len(noises),) * len(noises), noises)


def _ddim_step(
    x: Tensor, noise: Tensor, alpha: float, alpha_next: float, sigma: float = 0.0, clip: float | None = None
) -> Tensor:
    """One step of DDIM (Song et al. 2021, equation 12), without the fresh noise."""
    x_0 = (x - (1.0 - alpha) ** 0.5 * noise) / alpha**0.5
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    direction = max(1.0 - alpha_next - sigma**2, 0.0) ** 0.5 * noise
    return alpha_next**0.5 * x_0 + direction
