"""How a model is meant to be run: what stands beside the weights in every layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pbe.checkpoints.diffusers.scheduler import scheduler_from_solver, solver_from_scheduler
from pbe.checkpoints.settings import reading, solver_from_json, solver_to_json
from pbe.diffusion.solvers import SolverChoice
from pbe.errors import UserError

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
        if self.scheduler is not None and (self.solver is None or means(self.scheduler, self.solver)):
            return self.scheduler
        return scheduler_from_solver(self.solver or SolverChoice("pndm"))

    def section(self, layout: str) -> dict[str, Any]:
        """Return what a layout has no file of its own for, under its key; empty if it says it all."""
        found: dict[str, Any] = {}
        if self.conventions not in (None, CONVENTIONS.get(layout, "original")):
            found["conventions"] = self.conventions
        if self.watermark:
            found["watermark"] = True
        if layout != "diffusers":
            if self.solver is not None and self.solver != SolverChoice(DEFAULT_SOLVER):
                found["solver"] = solver_to_json(self.solver)
            if self.preprocessor:
                found["preprocessor"] = self.preprocessor
        return {OWN_KEY if layout == "diffusers" else KEY: found} if found else {}


UNSAID = Usage()


def means(scheduler: Mapping[str, Any], solver: SolverChoice) -> bool:
    """Return whether a ``scheduler_config.json`` is read as this solver."""
    try:
        return solver_from_scheduler(scheduler) == solver
    except UserError:
        return False


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
