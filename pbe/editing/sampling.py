"""Which solver runs and how, the checks of it, the progress bar, and who is told of each step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pbe.diffusion.guidance import PredictNoise
from pbe.diffusion.noise import Generators
from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers import SolverChoice, get_solver
from pbe.editing.conventions import Conventions
from pbe.editing.preprocess import check_count, check_number
from pbe.editing.problems import EditTypeError, EditValueError
from pbe.errors import UserError

Callback = Callable[[int, float, Tensor], None]


@dataclass(frozen=True)
class Sampling:
    """How latents are sampled; the fields are those of ``PaintByExample.__call__``."""

    choice: SolverChoice
    steps: int
    guidance_scale: float
    eta: float
    callback: Callback | None
    callback_steps: int

    def __post_init__(self) -> None:
        """Bring numbers of numpy, and floats that are whole, to Python's int and float.

        Raises:
            EditTypeError, EditValueError: a setting of the wrong kind.
        """
        numbers = {
            "steps": check_count("num_inference_steps", self.steps),
            "callback_steps": check_count("callback_steps", self.callback_steps, kind=EditValueError),
            "guidance_scale": check_number("guidance_scale", self.guidance_scale),
            "eta": check_number("eta", self.eta),
        }
        for name, value in numbers.items():
            object.__setattr__(self, name, value)

    def check(self, schedule: NoiseSchedule) -> int:
        """Check everything, and return the number of steps that the solver will report.

        Raises:
            EditTypeError, EditValueError: a setting that cannot be used.
        """
        check_callback(self.callback)
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0.0):
            raise EditValueError(f"guidance_scale is {self.guidance_scale}; it must be 0 or more")
        if not 0.0 <= self.eta <= 1.0:
            raise EditValueError(f"eta is {self.eta}; it must lie between 0 and 1")
        solver = get_solver(self.choice.name)
        if self.eta and solver.noise != "eta":
            kind = "draws its own noise" if solver.noise == "always" else "is deterministic"
            raise EditValueError(f"{solver.name} {kind}: eta must be 0 (use solver ddim for eta above 0)")
        try:
            return len(solver.grid(schedule, self.steps, self.choice))
        except UserError as error:
            raise EditValueError(str(error)) from error

    def run(
        self,
        predict: PredictNoise,
        x_T: Tensor,
        schedule: NoiseSchedule,
        generator: Generators,
        callback: Callback,
    ) -> Tensor:
        """Return the latents that the solver makes of the noise ``x_T``, ``(b, z, h, w)``."""
        return get_solver(self.choice.name)(
            predict,
            x_T,
            schedule,
            self.steps,
            eta=self.eta,
            generator=generator,
            callback=callback,
            settings=self.choice,
        )

    def timesteps(self, schedule: NoiseSchedule) -> Tensor:
        """Run the solver on a single number, to learn the timesteps ``(n,)`` of its calls of the network."""
        asked: list[Tensor] = []

        def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
            asked.append(timesteps)
            return torch.zeros_like(x_t)

        self.run(predict, torch.zeros(1, 1, 1, 1), schedule, torch.Generator(), lambda *_: None)
        return torch.cat(asked)


def check_callback(callback: Any) -> None:
    """Check that a callback can be called with (step, timestep, latents).

    Raises:
        EditTypeError: it is no function, or one of other arguments.
    """
    if callback is None:
        return
    if not callable(callback):
        raise EditTypeError(f"callback: {type(callback).__name__}; it must be a function")
    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):  # some that are written in C do not say what they take
        return
    try:
        signature.bind(0, 0.0, None)
    except TypeError as error:
        wanted = "it must take three arguments: step, timestep and latents"
        raise EditTypeError(f"callback: {wanted} ({error})") from error


def choose_solver(solver: str | SolverChoice) -> SolverChoice:
    """Return the choice that a name stands for.

    Raises:
        EditTypeError: neither a name nor a choice.
        EditValueError: no solver has that name.
    """
    if isinstance(solver, SolverChoice):
        return solver
    if not isinstance(solver, str):
        raise EditTypeError(f"solver: {type(solver).__name__}; it must be a name or a SolverChoice")
    try:
        return SolverChoice(get_solver(solver).name)
    except UserError as error:
        raise EditValueError(str(error)) from error


def with_spacing(choice: SolverChoice, conventions: Conventions) -> SolverChoice:
    """Return the choice with the conventions' timestep spacing where it has none of its own."""
    if choice.spacing is not None or choice.name not in conventions.leading:
        return choice
    return replace(choice, spacing="leading")


@dataclass
class Progress:
    """A bar of solver steps on stderr.

    Attributes:
        settings: arguments of tqdm, ``disable=True`` among them.
    """

    settings: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def watched(self, sampling: Sampling, total: int) -> Iterator[Callback]:
        """Show a bar of so many steps; yield the callback that moves it and then calls the user's."""
        with tqdm(**({"total": total, "desc": "painting", "unit": "step"} | self.settings)) as bar:

            def step(index: int, timestep: float, latents: Tensor) -> None:
                bar.update()
                if sampling.callback is not None and index % sampling.callback_steps == 0:
                    sampling.callback(index, timestep, latents)

            yield step
