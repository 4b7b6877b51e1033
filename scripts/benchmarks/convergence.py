"""How far a solver is from where it would end with ever more steps: runs that can be compared.

All runs start from the same latents at the last timestep and end clean. Solvers that draw noise get it from
one path of Brownian motion, so that they too go towards one solution, that of the reverse SDE on that path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pbe.diffusion.guidance import PredictNoise
from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers import SolverChoice, get_solver
from pbe.diffusion.solvers.registry import Run


@dataclass(frozen=True)
class Candidate:
    """One way to solve.

    Attributes:
        label: what tables call it.
        solver: its name.
        karras: with Karras sigmas.
        eta: of DDIM.
    """

    label: str
    solver: str
    karras: bool = False
    eta: float = 0.0

    @property
    def stochastic(self) -> bool:
        """Whether it solves the reverse SDE instead of the probability flow."""
        return get_solver(self.solver).needs_noise(self.eta)


@dataclass(frozen=True)
class Solution:
    """Where a run ended.

    Attributes:
        latents: ``(b, c, h, w)``.
        calls: of the network.
    """

    latents: Tensor
    calls: int


class BrownianPath:
    """Fresh noise that belongs to noise levels and not to steps.

    In the clock ``abar / (1 - abar)``, signal over noise, the noise of the reverse SDE is Brownian motion: a
    step from clock s to t adds ``W(t) - W(s)``, in units of its deviation ``sqrt(t - s)``. The increments
    between all timesteps of a schedule are drawn once; longer steps add up what lies between.

    Args:
        schedule: noise schedule.
        shape: of the latents, ``(b, c, h, w)``.
        generator: CPU generator; None draws from torch's own state.
    """

    def __init__(
        self, schedule: NoiseSchedule, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> None:
        self.clock = (schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)).flip(0)  # ascending
        lengths = self.clock.diff()
        increments = torch.randn((len(lengths), *shape), generator=generator)
        walked = (increments * lengths.sqrt().float().view(-1, *(1 for _ in shape))).cumsum(0)
        self.places = torch.cat([torch.zeros(1, *shape), walked])

    def noise(self, alpha: float, alpha_next: float) -> Tensor:
        """Return the noise of a step between the levels of two timesteps; 0 for a step to clean data.

        Raises:
            ValueError: a level lies between those of the timesteps.
        """
        if alpha_next >= 1.0:
            return torch.zeros_like(self.places[0])
        start, end = self._index(alpha), self._index(alpha_next)
        return (self.places[end] - self.places[start]) / float((self.clock[end] - self.clock[start]).sqrt())

    def _index(self, alpha: float) -> int:
        time = alpha / (1.0 - alpha)
        index = int((self.clock - time).abs().argmin())
        if abs(float(self.clock[index]) - time) > 1e-6 * time:
            raise ValueError(f"the path is known at the levels of timesteps, not at abar = {alpha}")
        return index


@dataclass(frozen=True)
class DrivenRun(Run):
    """A run whose noise comes from a path."""

    path: BrownianPath | None = None

    def fresh(self, x: Tensor, index: int) -> Tensor:
        """Return the noise of the step from level ``index``."""
        assert self.path is not None
        return self.path.noise(self.grid.alphas[index], self.grid.alphas_next[index]).to(x)


def solve(
    candidate: Candidate,
    predict_noise: PredictNoise,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    path: BrownianPath,
) -> Solution:
    """Run a solver from latents ``x_T``, of unit variance at the last timestep, to clean ones.

    Steps are ``trailing``, which starts at the last timestep; Karras sigmas also reach down to the first.
    Numbers of steps that divide the schedule's leave no strides uneven.
    """
    calls = 0

    def counted(x: Tensor, timesteps: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return predict_noise(x, timesteps)

    solver = get_solver(candidate.solver)
    spacing = "linspace" if candidate.karras else "trailing"
    settings = SolverChoice(candidate.solver, spacing, candidate.karras, end="clean")
    grid = solver.grid(schedule, steps, settings)
    # solvers in sigma hold x_t / sqrt(abar), and would take the start for noise alone
    scale = 1.0 if grid.scale == 1.0 else grid.alphas[0] ** -0.5
    run = DrivenRun(replace(grid, scale=scale), settings, counted, candidate.eta, None, None, path)
    return Solution(solver.integrate(run, scale * x_T), calls)


def steps_for(candidate: Candidate, calls: int) -> int:
    """Return the most steps that a number of network calls pays for, at least 1."""
    if candidate.solver == "heun":
        return (calls + 1) // 2
    return max(1, calls - 1) if candidate.solver in ("plms", "pndm") else calls


def distance(latents: Tensor, reference: Tensor) -> float:
    """Return ``|x - reference| / |reference|`` (Euclidean), averaged over the samples."""
    difference = (latents - reference).flatten(1).norm(dim=1)
    return float((difference / reference.flatten(1).norm(dim=1)).mean())
