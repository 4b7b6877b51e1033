"""The registry of solvers, and the one signature that all of them have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pbe.diffusion.guidance import PredictNoise
from pbe.diffusion.noise import Generators, draw_noise
from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers.grid import Grid
from pbe.diffusion.solvers.settings import SPACINGS, SolverChoice
from pbe.errors import UserError

Callback = Callable[[int, float, Tensor], None]
MakeGrid = Callable[[NoiseSchedule, int, SolverChoice], Grid]


@dataclass(frozen=True)
class Run:
    """One run as a solver's formulae see it: the grid, the network, the noise and who watches."""

    grid: Grid
    settings: SolverChoice
    predict_noise: PredictNoise
    eta: float
    generator: Generators
    callback: Callback | None

    def noise(self, x: Tensor, index: int) -> Tensor:
        """Ask the network for the noise in ``x`` (of unit variance) at level ``index`` of the grid."""
        timestep = self.grid.timesteps[index]
        dtype = torch.long if isinstance(timestep, int) else torch.float32
        return self.predict_noise(x, torch.full((x.shape[0],), timestep, device=x.device, dtype=dtype))

    def fresh(self, x: Tensor, index: int) -> Tensor:
        """Draw standard normal noise like ``x`` for the step from level ``index``."""
        return draw_noise(x.shape, self.generator).to(x)

    def report(self, index: int, x: Tensor) -> None:
        """Tell the callback that the step from level ``index`` led to ``x``."""
        if self.callback is not None:
            self.callback(index, self.grid.timesteps[index], x)


@dataclass(frozen=True)
class Solver:
    """A solver of the reverse process: formulae, the grid they walk and what they accept.

    Attributes:
        name: its name in :data:`SOLVERS`.
        integrate: ``integrate(run, x_T) -> x_0``.
        make_grid: lays out the noise levels.
        spacing: the timestep spacing taken where none is asked for.
        noise: when fresh noise is drawn: ``never``, ``always``, or with ``eta`` above 0.
        karras: whether Karras sigmas can be asked for.
    """

    name: str
    integrate: Callable[[Run, Tensor], Tensor]
    make_grid: MakeGrid
    spacing: str
    noise: str = "never"
    karras: bool = True

    def __call__(
        self,
        predict_noise: PredictNoise,
        x_T: Tensor,
        schedule: NoiseSchedule,
        steps: int,
        *,
        eta: float = 0.0,
        generator: Generators = None,
        callback: Callback | None = None,
        settings: SolverChoice | None = None,
        **options: Any,
    ) -> Tensor:
        """Integrate from noise ``x_T`` (b, c, h, w) to latents.

        Args:
            predict_noise: ``predict_noise(x_t, timesteps (b,))`` for x_t of unit variance; timesteps are
                int64, or float32 where the solver's are fractional.
            x_T: standard normal start, whatever scale the solver works in.
            schedule: noise schedule.
            steps: number of steps asked for; ``uniform`` spacing may make a few more.
            eta: share of fresh noise, 0 (deterministic) to 1 (DDPM, for DDIM); DDIM and LCM only.
            generator: CPU generator of fresh noise, or one for each sample; one draw a step.
            callback: called after each step with (index, timestep, x), x in the solver's own scale: noise
                added to the data for Euler, Heun and LMS, unit variance for all others.
            settings: spacing, Karras sigmas and finer settings; its name is not looked at.
            options: fields of :class:`SolverChoice` in place of those of ``settings``.
        """
        if eta and self.noise != "eta":
            kind = "draws its own noise" if self.noise == "always" else "is deterministic"
            raise UserError(f"{self.name} {kind}: eta must be 0 (use ddim or lcm for eta above 0)")
        settings = replace(settings or SolverChoice(self.name), **options)
        grid = self.grid(schedule, steps, settings)
        return self.integrate(Run(grid, settings, predict_noise, eta, generator, callback), grid.scale * x_T)

    def grid(
        self, schedule: NoiseSchedule, steps: int, settings: SolverChoice | None = None, **options: Any
    ) -> Grid:
        """Return the noise levels of a run; its length is the number of times that the callback is called."""
        settings = replace(settings or SolverChoice(self.name), **options)
        if settings.karras and not self.karras:
            known = [name for name, each in SOLVERS.items() if each.karras]
            raise UserError(f"{self.name} has no Karras sigmas; they need one of: {', '.join(known)}")
        spacing = self.spacing if settings.spacing is None else settings.spacing
        if spacing not in SPACINGS:
            raise UserError(f"no timestep spacing '{spacing}'; there are: {', '.join(SPACINGS)}")
        return self.make_grid(schedule, steps, replace(settings, spacing=spacing))

    def needs_noise(self, eta: float = 0.0) -> bool:
        """Return whether a run draws fresh noise."""
        return self.noise == "always" or (self.noise == "eta" and eta > 0.0)


SOLVERS: dict[str, Solver] = {}

ALIASES = {
    "k_euler": "euler",
    "euler_a": "euler_ancestral",
    "k_euler_a": "euler_ancestral",
    "k_euler_ancestral": "euler_ancestral",
    "k_heun": "heun",
    "k_lms": "lms",
    "dpm++": "dpmpp_2m",
    "dpm++_2m": "dpmpp_2m",
    "dpmpp": "dpmpp_2m",
    "dpmsolver": "dpmpp_2m",
    "dpmsolver++": "dpmpp_2m",
    "dpm++_sde": "dpmpp_sde",
    "dpm++_2m_sde": "dpmpp_sde",
    "dpmpp_2m_sde": "dpmpp_sde",
    "dpmsolver_sde": "dpmpp_sde",
    "sde_dpmsolver++": "dpmpp_sde",
    "uni_pc": "unipc",
}


def solver(
    make_grid: MakeGrid, spacing: str, *, noise: str = "never", karras: bool = True
) -> Callable[[Callable[[Run, Tensor], Tensor]], Solver]:
    """Turn formulae into a :class:`Solver` named like their function, and register it."""

    def register(integrate: Callable[[Run, Tensor], Tensor]) -> Solver:
        made = Solver(integrate.__name__, integrate, make_grid, spacing, noise, karras)
        SOLVERS[made.name] = made
        return made

    return register


def get_solver(name: str) -> Solver:
    """Return the solver of that name or alias; case, spaces and hyphens do not matter."""
    plain = name.strip().lower().replace(" ", "_").replace("-", "_")
    found = SOLVERS.get(ALIASES.get(plain, plain))
    if found is None:
        raise UserError(f"no solver '{name}'; there are: {', '.join(SOLVERS)}")
    return found


def needs_noise(name: str, eta: float = 0.0) -> bool:
    """Return whether the solver of that name draws fresh noise at this eta."""
    return get_solver(name).needs_noise(eta)


def weighted(weights: tuple[float, ...], tensors: list[Tensor]) -> Tensor:
    """Return the weighted sum of tensors."""
    return sum((w * t for w, t in zip(weights, tensors, strict=True)), tensors[0].new_zeros(()))
