"""Where a solver looks: its timesteps, and the noise level at each of them and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers.settings import SolverChoice
from pbe.errors import UserError

KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Grid:
    """The noise levels of one run, from noise to data.

    Attributes:
        timesteps: what the network is told at each level; fractional where a solver walks sigmas.
        alphas: share of signal variance (abar) at each level.
        alphas_next: the share that the step from each level leads to.
        scale: what standard normal noise is multiplied by to start the run.
    """

    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]
    alphas_next: tuple[float, ...]
    scale: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def sigmas(self) -> list[float]:
        """Noise over signal, ``sqrt(1 / abar - 1)``, at every level and, last, where the run ends."""
        return [(1.0 / alpha - 1.0) ** 0.5 for alpha in (*self.alphas, self.alphas_next[-1])]


def uniform_timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Return the original's timesteps, ascending: ``range(0, T, T // steps)`` plus one.

    When ``steps`` does not divide T there are a few more than asked for (30 gives 31).
    """
    _check_steps(steps, schedule.timesteps // 2)
    return [t + 1 for t in range(0, schedule.timesteps - 1, schedule.timesteps // steps)]


def spaced_timesteps(
    schedule: NoiseSchedule, steps: int, settings: SolverChoice, spare: int = 0
) -> list[float]:
    """Return the timesteps of a spacing, descending (Lin et al. 2024, table 2).

    ``leading`` counts up from ``offset`` in strides of ``T // steps``, ``trailing`` down from T - 1 in
    strides of ``T / steps``, ``linspace`` spreads over 0..T-1, fractional; for ``uniform`` see
    :func:`uniform_timesteps`.

    Args:
        schedule: noise schedule of T timesteps.
        steps: how many were asked for.
        settings: spacing and offset.
        spare: ``leading`` and ``linspace`` are laid out for so many steps more, the last of which, next to
            the data, are left out.
    """
    total, spacing, offset = schedule.timesteps, settings.spacing, settings.offset
    if spacing == "uniform":
        return [float(t) for t in reversed(uniform_timesteps(schedule, steps))]
    room = {"leading": total - spare - offset, "linspace": total - spare, "trailing": total}
    assert spacing in room  # Solver.grid has filled it in and checked it
    _check_steps(steps, room[spacing])
    if spacing == "leading":
        ascending = np.arange(spare, steps + spare) * float(total // (steps + spare)) + offset
    elif spacing == "linspace":
        ascending = np.linspace(0, total - 1, steps + spare)[spare:]
    else:
        ascending = np.arange(total, 0, -total / steps)[:steps].round()[::-1] - 1
    if ascending[-1] > total - 1:
        raise UserError(f"steps_offset is {offset}: {steps} steps would start beyond timestep {total - 1}")
    return [float(t) for t in ascending[::-1]]


def _check_steps(steps: int, limit: int) -> None:
    if not 1 <= steps <= limit:
        raise UserError(f"number of steps is {steps}; it must lie between 1 and {limit}")


def strided_grid(schedule: NoiseSchedule, steps: int, settings: SolverChoice) -> Grid:
    """Lay out DDIM and PLMS: every step leads ``T // steps`` timesteps down, the last to abar_0.

    Under ``linspace`` and ``trailing`` that is not quite where the next step starts; the reference
    implementation does so, and results are compared with it.
    """
    timesteps = _whole(spaced_timesteps(schedule, steps, settings))
    return strided(schedule, settings, timesteps, [t - schedule.timesteps // steps for t in timesteps])


def strided(
    schedule: NoiseSchedule, settings: SolverChoice, timesteps: Sequence[int], targets: Sequence[int]
) -> Grid:
    """Return the grid of steps from ``timesteps`` to ``targets``; targets below 0 are the run's end."""
    alphas, end = schedule.alphas_cumprod, _end(schedule, settings, "first")
    return Grid(
        tuple(timesteps),
        tuple(float(alphas[t]) for t in timesteps),
        tuple(float(alphas[t]) if t >= 0 else end for t in targets),
    )


def log_snr_grid(schedule: NoiseSchedule, steps: int, settings: SolverChoice) -> Grid:
    """Lay out DPM-Solver and UniPC: whole timesteps, the last a full step away from the end."""
    sigmas = _schedule_sigmas(schedule)
    if settings.karras:
        _check_steps(steps, schedule.timesteps)
        levels = karras_sigmas(sigmas[-1], sigmas[0], steps)
        timesteps = [round(t) for t in _timesteps_of(levels, sigmas)]
    else:
        timesteps = _whole(spaced_timesteps(schedule, steps, settings, spare=1))
        levels = sigmas[timesteps]
    return _from_sigmas(timesteps, levels, _end(schedule, settings, "clean"))


def sigma_grid(schedule: NoiseSchedule, steps: int, settings: SolverChoice) -> Grid:
    """Lay out the solvers that walk sigmas (Euler, Heun, LMS): ``linspace`` reaches timestep 0.

    ``linspace`` and ``trailing`` start at the end of the schedule, where noise is taken to be all there is;
    the others start with noise of the variance of noised data.
    """
    sigmas = _schedule_sigmas(schedule)
    timesteps = spaced_timesteps(schedule, steps, settings)
    levels = np.interp(timesteps, np.arange(len(sigmas)), sigmas)
    if settings.karras:
        levels = karras_sigmas(levels[0], levels[-1], len(levels))
        timesteps = _timesteps_of(levels, sigmas)
    first = float(levels[0])
    scale = first if settings.spacing in ("linspace", "trailing") else (first**2 + 1.0) ** 0.5
    return replace(_from_sigmas(timesteps, levels, _end(schedule, settings, "clean")), scale=scale)


def _end(schedule: NoiseSchedule, settings: SolverChoice, default: str) -> float:
    """Return the signal share (abar) at the end; ``default`` is where if the settings do not say."""
    return 1.0 if (settings.end or default) == "clean" else float(schedule.alphas_cumprod[0])


def _schedule_sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """Return noise over signal at every timestep of the schedule, ascending, ``(T,)``."""
    alphas = schedule.alphas_cumprod.numpy()
    return np.sqrt((1.0 - alphas) / alphas)


def karras_sigmas(first: float, last: float, steps: int, rho: float = KARRAS_RHO) -> np.ndarray:
    """Return ``(steps,)`` sigmas, evenly spaced in ``sigma ** (1 / rho)`` (Karras et al. 2022, eq. 5)."""
    return np.linspace(first ** (1 / rho), last ** (1 / rho), steps) ** rho


def _timesteps_of(levels: np.ndarray, sigmas: np.ndarray) -> list[float]:
    """Return the fractional timesteps of noise levels, interpolated in log sigma."""
    return [float(t) for t in np.interp(np.log(levels), np.log(sigmas), np.arange(len(sigmas)))]


def _from_sigmas(timesteps: Sequence[float], levels: np.ndarray, end: float) -> Grid:
    alphas = tuple(float(alpha) for alpha in 1.0 / (1.0 + levels**2))
    return Grid(tuple(timesteps), alphas, (*alphas[1:], end))


def _whole(timesteps: Sequence[float]) -> list[int]:
    return [round(t) for t in timesteps]
