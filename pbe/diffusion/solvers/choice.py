"""A solver and how it is to be run, and the plain values that files keep of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pbe.diffusion.solvers.grid import SPACINGS
from pbe.diffusion.solvers.registry import Solver, get_solver
from pbe.diffusion.solvers.settings import DEFAULTS, Settings
from pbe.errors import UserError


@dataclass(frozen=True)
class SolverChoice:
    """A solver and how it is to be run.

    Attributes:
        name: a name in ``SOLVERS``.
        spacing: timestep spacing; None is the solver's own.
        karras: Karras sigmas.
        settings: finer settings.
    """

    name: str
    spacing: str | None = None
    karras: bool = False
    settings: Settings = DEFAULTS

    @property
    def solver(self) -> Solver:
        """The solver itself; pass it spacing, karras and settings."""
        return get_solver(self.name)


def solver_to_json(choice: SolverChoice) -> dict[str, Any]:
    """Return a choice as plain values; what is at its default is left out."""
    found: dict[str, Any] = {"name": choice.solver.name}
    if choice.spacing is not None:
        found["spacing"] = choice.spacing
    if choice.karras:
        found["karras"] = True
    values, usual = dataclasses.asdict(choice.settings), dataclasses.asdict(DEFAULTS)
    settings = {key: value for key, value in values.items() if value != usual[key]}
    return found | ({"settings": settings} if settings else {})


def solver_from_json(values: Any, source: str) -> SolverChoice:
    """Return the choice that :func:`solver_to_json` wrote.

    Args:
        values: of the file.
        source: where they stand, for errors.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise UserError(f"{source}: not a solver with a name; remove the entry to run with the default")
    _check_keys(values, ("name", "spacing", "karras", "settings"), source)
    spacing, karras = values.get("spacing"), values.get("karras", False)
    if spacing is not None and spacing not in SPACINGS:
        raise UserError(f"{source}: no timestep spacing {spacing!r}; there are: {', '.join(SPACINGS)}")
    if not isinstance(karras, bool):
        raise UserError(f"{source}: karras is {karras!r}; it must be true or false")
    try:
        name = get_solver(values["name"]).name
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return SolverChoice(name, spacing, karras, _settings(values.get("settings", {}), f"{source}: settings"))


def _settings(values: Any, source: str) -> Settings:
    if not isinstance(values, Mapping):
        raise UserError(f"{source} are {values!r}; they must be names with values")
    _check_keys(values, tuple(vars(DEFAULTS)), source)
    try:
        return Settings(**values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...], source: str) -> None:
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise UserError(f"{source}: no setting '{unknown[0]}'; there are: {', '.join(known)}")
