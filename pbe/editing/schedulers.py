"""Solvers in the form of diffusers' schedulers: what a pipeline shows as its scheduler, and what it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from pbe.checkpoints.diffusers.config import write_scheduler
from pbe.checkpoints.diffusers.scheduler import BETAS, CLASSES, OWN, solver_from_scheduler
from pbe.diffusion.solvers import SolverChoice
from pbe.editing.problems import EditTypeError, EditValueError
from pbe.errors import UserError
from pbe.models import LatentDiffusion


class ReadOnly(dict[str, Any]):
    """A mapping of settings that are read as attributes, too, and cannot be changed."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no setting '{name}'; there are: {', '.join(self)}")

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise EditTypeError(
            "settings are read-only; pipe.solver and pipe.scheduler take others, and so do a call's arguments"
        )

    __setattr__ = __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadOnly, (dict(self),)


class Scheduler:
    """What ``pipe.scheduler`` tells: the solver as a configuration that diffusers' classes take.

    Attributes:
        config: of ``X.from_config(pipe.scheduler.config)``.
        compatibles: names of the classes that ``pipe.scheduler = X.from_config(...)`` takes.
    """

    compatibles = tuple(CLASSES)

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = ReadOnly(config)

    def __repr__(self) -> str:
        return f"Scheduler({dict(self.config)})"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"pipe.scheduler has no '{name}': it tells the solver's config, and steps are made inside a call"
        )


def solver_of(scheduler: Any, model: LatentDiffusion) -> SolverChoice:
    """Return the solver that a scheduler stands for.

    Args:
        scheduler: of diffusers, of another pipeline, or the configuration of one.
        model: whose noise schedule and prediction it has to have.

    Raises:
        EditTypeError: no scheduler.
        EditValueError: one that is not supported, or made for another noise schedule.
    """
    config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise EditTypeError(
            f"scheduler: {type(scheduler).__name__}; it must be one of diffusers' {', '.join(CLASSES)}"
        )
    values = dict(config)
    if not isinstance(scheduler, Scheduler | Mapping):
        # a configuration carries notes of the class that it was made from along
        values = {key: value for key, value in values.items() if key != OWN}
        values["_class_name"] = type(scheduler).__name__
    try:
        choice = solver_from_scheduler(values)
    except UserError as error:
        raise EditValueError(str(error)) from error
    _check_betas(values, model)
    return choice


def _check_betas(values: Mapping[str, Any], model: LatentDiffusion) -> None:
    start, end = BETAS[values["_class_name"]]
    found: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_start": start,
        "beta_end": end,
        "prediction_type": "epsilon",
    }
    found |= {key: values[key] for key in found if key in values}
    for key, wanted in write_scheduler(model.config, {}).items():
        value = found.get(key, wanted)
        if value != wanted and not _close(value, wanted):
            raise EditValueError(
                f"the scheduler's {key} is {value}, the model's {wanted}; "
                "make it by X.from_config(pipe.scheduler.config)"
            )


def _close(one: Any, other: Any) -> bool:
    """Return whether two values are numbers that differ by rounding only."""
    return all(isinstance(each, int | float) for each in (one, other)) and math.isclose(
        one, other, rel_tol=1e-6
    )
