"""What a solver can be told beyond steps, spacing and Karras sigmas."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The finer settings; each default is what Stable Diffusion's users get, and few need another.

    Attributes:
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

    offset: int = 1
    end: str | None = None
    clip: float | None = None
    runge_kutta: bool = False
    order: int = 2
    variant: str | None = None
    predicts: str = "data"


DEFAULTS = Settings()
