"""Paint by Example: exemplar-based image editing with a latent diffusion model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pbe.editing.pipeline import PaintByExample as PaintByExample

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import :class:`~pbe.editing.pipeline.PaintByExample`, and torch with it, when it is asked for."""
    if name == "PaintByExample":
        from pbe.editing.pipeline import PaintByExample

        return PaintByExample
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
