"""Settings in the files of a model: read from JSON, checked, and refused where they have another form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pbe.diffusion.solvers import SPACINGS, SolverChoice, get_solver
from pbe.diffusion.solvers.settings import FINER
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


def solver_to_json(choice: SolverChoice) -> dict[str, Any]:
    """Return a solver and how it is run as plain values; what is at its default is left out."""
    found: dict[str, Any] = {"name": get_solver(choice.name).name}
    if choice.spacing is not None:
        found["spacing"] = choice.spacing
    if choice.karras:
        found["karras"] = True
    values = {key: getattr(choice, key) for key in FINER}
    settings = {key: value for key, value in values.items() if value != FINER[key]}
    return found | ({"settings": settings} if settings else {})


def solver_from_json(values: Any, source: str) -> SolverChoice:
    """Return the choice that :func:`solver_to_json` wrote; ``source`` is the place, for errors."""
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise UserError(f"{source}: not a solver with a name; remove the entry to run with the default")
    spacing, karras, settings = values.get("spacing"), values.get("karras", False), values.get("settings", {})
    if not isinstance(settings, Mapping):
        raise UserError(f"{source}: settings are {settings!r}; they must be names with values")
    for given, known in ((values, ("name", "spacing", "karras", "settings")), (settings, tuple(FINER))):
        if unknown := [str(key) for key in given if key not in known]:
            raise UserError(f"{source}: no setting '{unknown[0]}'; there are: {', '.join(known)}")
    if spacing is not None and spacing not in SPACINGS:
        raise UserError(f"{source}: no timestep spacing {spacing!r}; there are: {', '.join(SPACINGS)}")
    if not isinstance(karras, bool):
        raise UserError(f"{source}: karras is {karras!r}; it must be true or false")
    try:
        return SolverChoice(get_solver(values["name"]).name, spacing, karras, **settings)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
