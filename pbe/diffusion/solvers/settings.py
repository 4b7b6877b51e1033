"""A solver and how it is run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pbe.errors import UserError

SPACINGS = ("uniform", "leading", "linspace", "trailing")
WORDS: dict[str, tuple[str | None, ...]] = {
    "end": (None, "first", "clean"),
    "variant": (None, "midpoint", "heun", "bh1", "bh2"),
    "predicts": ("data", "noise"),
}


@dataclass(frozen=True)
class SolverChoice:
    """A solver and how it is run; each default is what Stable Diffusion's users get.

    Attributes:
        name: a name in ``SOLVERS``.
        spacing: timestep spacing, one of ``SPACINGS``; None is the solver's own.
        karras: space the noise levels after Karras et al. 2022, equation 5.
        offset: timestep at which ``leading`` ends (``steps_offset`` in diffusers' configs).
        end: where a run ends: ``first``, at the noise level of timestep 0, or ``clean``, at none at all.
            None: ``first`` for DDIM, PLMS and PNDM, ``clean`` for the rest.
        clip: DDIM clips its prediction of the clean latents to plus and minus this; None does not.
        runge_kutta: PNDM starts with three Runge-Kutta steps of four network calls each, as its paper does.
        order: order of DPM-Solver and UniPC, 1 to 3.
        variant: ``midpoint`` or ``heun`` for DPM-Solver of order 2, ``bh1`` or ``bh2`` (the choice of
            B(h)) for UniPC. None: ``midpoint`` and ``bh2``.
        predicts: DPM-Solver and UniPC interpolate the predicted ``data`` (DPM-Solver++) or ``noise``
            (DPM-Solver); ``noise`` cannot end ``clean``.
    """

    name: str
    spacing: str | None = None
    karras: bool = False
    offset: int = 1
    end: str | None = None
    clip: float | None = None
    runge_kutta: bool = False
    order: int = 2
    variant: str | None = None
    predicts: str = "data"

    def __post_init__(self) -> None:
        check_settings({key: getattr(self, key) for key in FINER})


# The settings that few need, with their defaults.
FINER = {field.name: field.default for field in dataclasses.fields(SolverChoice)[3:]}


def check_settings(values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Check finer settings, which files may hold anything for."""
    for key, value in values.items():
        if not _has_meaning(key, value):
            raise UserError(f"{(names or {}).get(key, key)} is {value!r}, which is not possible")


def _has_meaning(key: str, value: Any) -> bool:
    if key in WORDS:
        return value in WORDS[key] and isinstance(value, str | None)
    if key == "runge_kutta":
        return isinstance(value, bool)
    if key == "clip":
        return value is None or (_is_number(value, (int, float)) and math.isfinite(value) and value > 0)
    return _is_number(value, (int,)) and (value >= 0 if key == "offset" else 1 <= value <= 3)


def _is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


FEW_STEPS_SOLVER = SolverChoice("lcm")
"""How a model that was distilled is run."""
