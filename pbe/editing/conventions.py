"""How the two codebases that Paint by Example weights come from prepare what the networks see."""

from __future__ import annotations

from dataclasses import dataclass

from pbe.errors import EditValueError


@dataclass(frozen=True)
class Conventions:
    """Where the original's inference and diffusers' pipeline differ.

    Attributes:
        name: ``original`` or ``diffusers``.
        crop_exemplar: the exemplar goes through CLIP's processor (shortest edge, centre crop) instead of
            being squashed whole.
        mask_mode: interpolation of the keep mask to latent size, never antialiased.
        half_is_hole: a mask value of exactly one half is repainted.
        share_posterior: the masked picture's posterior is drawn once a picture, not once an edit.
        guidance_floor: guidance scales below count as this.
        leading: solvers that take timesteps in ``leading`` spacing where none is asked for.
        largest_side: pictures up to the square of this many pixels a side are edited at their own size
            whatever size the model was trained at.
    """

    name: str
    crop_exemplar: bool
    mask_mode: str
    half_is_hole: bool
    share_posterior: bool
    guidance_floor: float
    leading: frozenset[str]
    largest_side: int


ORIGINAL = Conventions(
    name="original",
    crop_exemplar=False,
    mask_mode="bilinear",
    half_is_hole=True,
    share_posterior=False,
    guidance_floor=0.0,
    leading=frozenset(),
    largest_side=0,
)
DIFFUSERS = Conventions(
    name="diffusers",
    crop_exemplar=True,
    mask_mode="nearest",
    half_is_hole=False,
    share_posterior=True,
    guidance_floor=1.0,
    leading=frozenset({"ddim", "plms"}),
    largest_side=1024,
)
CONVENTIONS = {each.name: each for each in (ORIGINAL, DIFFUSERS)}


def get_conventions(name: str) -> Conventions:
    """Return the conventions of that name."""
    if name not in tuple(CONVENTIONS):
        raise EditValueError(f"no conventions '{name}'; there are: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]
