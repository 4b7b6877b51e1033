"""Settings in the files of a model: read and checked, and how the model is meant to be run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from pbe.checkpoints.diffusers.scheduler import (
    scheduler_from_solver,
    solver_from_json,
    solver_from_scheduler,
    solver_to_json,
)
from pbe.config import ModelConfig
from pbe.diffusion.solvers import FEW_STEPS_SOLVER, SolverChoice
from pbe.errors import UserError

Values = dict[str, Any]

# What Python raises where a value has another type, or a list another length, than the reader of it expects.
MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turn what Python raises where settings have another form than the block expects into a UserError."""
    try:
        yield
    except MALFORMED as error:
        why = " ".join(str(error).split())
        raise UserError(f"'{source}': a setting cannot be read ({why}); copy the model again") from error


def read_json(path: Path) -> Values:
    """Read a JSON file that holds one object."""
    if not path.is_file():
        raise UserError(f"'{path.parent}' has no {path.name}; copy the model again")
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not an object of settings; copy the model again")
    return content


class Settings:
    """Settings of one file or of a section in it, by which errors name them."""

    def __init__(self, values: Values, source: str) -> None:
        self.values, self.source = values, source

    def fixed(self, wanted: Values) -> None:
        """Check settings that have one value only here; those that are absent have it."""
        for key, value in wanted.items():
            if self.values.get(key, value) != value:
                self.refuse(
                    f"'{key}' is {json.dumps(self.values[key])}; this model has {json.dumps(value)} only"
                )

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting; without a default it has to be there."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            self.refuse(f"'{key}' is missing")
        return value

    def number(self, key: str, default: int | None = None) -> int:
        """Return a whole number above zero, given once or alike for every level."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(f"'{key}' is {json.dumps(value)}; this model has one whole number for all levels")
        return int(value)

    def real(self, key: str, default: float | None) -> float:
        """Return a number; without a default it has to be there."""
        value = self.get(key, default)
        if not isinstance(value, (int, float)):
            self.refuse(f"'{key}' is {json.dumps(value)}, not a number")
        return float(value)

    def channels(self) -> tuple[int, list[int]]:
        """Return the width of the finest level, and every level's as a multiple of it."""
        widths = self.get("block_out_channels")
        if not isinstance(widths, list) or any(
            not isinstance(w, int) or w < 1 or w % widths[0] for w in widths
        ):
            self.refuse(f"'block_out_channels' is {json.dumps(widths)}; each must be a multiple of the first")
        return widths[0], [width // widths[0] for width in widths]

    def refuse(self, reason: str) -> NoReturn:
        """Raise the error that names the file."""
        raise UserError(f"{self.source}: {reason}")


DEFAULT_SOLVER = "plms"
CONVENTIONS = {"diffusers": "diffusers"}  # of a layout whose files do not say; "original" of all others
KEY = "pipeline"  # of the section in config.json and config.yaml
OWN_KEY = "_pbe"  # of the entry in model_index.json: diffusers leaves keys with an underscore alone


@dataclass(frozen=True)
class Usage:
    """What a pipeline does with a model unless a call says otherwise; None is what the files do not say.

    Attributes:
        solver: and how it is run.
        conventions: name of the pipeline's conventions.
        watermark: whether edits get the watermark.
        preprocessor: a parsed ``preprocessor_config.json``.
        scheduler: a parsed ``scheduler_config.json``, written again as it is where it means ``solver``.
    """

    solver: SolverChoice | None = None
    conventions: str | None = None
    watermark: bool | None = None
    preprocessor: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None

    def complete(self, layout: str) -> Usage:
        """Say what the files of a layout leave open, as loading them does."""
        solver = self.solver
        if solver is None:
            read = None if self.scheduler is None else solver_from_scheduler(self.scheduler)
            solver = read or SolverChoice(DEFAULT_SOLVER)
        conventions = self.conventions or CONVENTIONS.get(layout, "original")
        return replace(self, solver=solver, conventions=conventions)

    def scheduler_config(self) -> dict[str, Any]:
        """Return the ``scheduler_config.json`` to write, but for the betas and what the network predicts."""
        if self.scheduler is not None:
            with suppress(UserError):  # one that cannot be read means no solver of a call
                if self.solver is None or solver_from_scheduler(self.scheduler) == self.solver:
                    return self.scheduler
        return scheduler_from_solver(self.solver or SolverChoice("pndm"))

    def section(self, layout: str, usual: SolverChoice | None = None) -> dict[str, Any]:
        """Return what a layout has no file of its own for, under its key; empty if it says it all.

        ``usual`` is the solver of such models where their files name none; None is that of most.
        """
        found: dict[str, Any] = {}
        if self.conventions not in (None, CONVENTIONS.get(layout, "original")):
            found["conventions"] = self.conventions
        if self.watermark:
            found["watermark"] = True
        if layout != "diffusers":
            if self.solver is not None and self.solver != (usual or SolverChoice(DEFAULT_SOLVER)):
                found["solver"] = solver_to_json(self.solver)
            if self.preprocessor:
                found["preprocessor"] = self.preprocessor
        return {OWN_KEY if layout == "diffusers" else KEY: found} if found else {}


UNSAID = Usage()


def usage_for(config: ModelConfig, said: Usage = UNSAID) -> Usage:
    """Return how a model of these sizes is run: one of few steps by their solver, unless files say."""
    return replace(said, solver=FEW_STEPS_SOLVER) if config.unet.few_steps and said.solver is None else said


def usage_from_json(values: Any, source: str | Path) -> Usage:
    """Read the content of a section that :meth:`Usage.section` gave; None means that there is none."""
    if values is None:
        return UNSAID
    where = f"{source}: {KEY}"
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is {json.dumps(values)}; it must be a section of settings")
    kinds = {"solver": Mapping, "conventions": str, "watermark": bool, "preprocessor": Mapping}
    with reading(source):
        for key, value in values.items():
            if key not in kinds:
                raise UserError(f"{where}: no setting '{key}'; there are: {', '.join(kinds)}")
            if not isinstance(value, kinds[key]):
                raise UserError(f"{where}: {key} is {json.dumps(value)}, which is not possible")
        found = dict(values)
        if "solver" in found:
            found["solver"] = solver_from_json(found["solver"], f"{where}: solver")
        if "preprocessor" in found:
            found["preprocessor"] = dict(found["preprocessor"])
        return Usage(**found)
