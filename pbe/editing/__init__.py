"""Editing: the pipeline that a person calls, and the command line around it.

Nothing here imports torch until it is needed, so that ``sample.py --help`` and its complaints are immediate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pbe.editing.output import EditOutput, EditOutput as StableDiffusionPipelineOutput
    from pbe.editing.pipeline import PaintByExample, PaintByExample as PaintByExamplePipeline

__all__ = ["EditOutput", "PaintByExample", "PaintByExamplePipeline", "StableDiffusionPipelineOutput"]
# What diffusers calls them.
THEIRS = {"PaintByExamplePipeline": "PaintByExample", "StableDiffusionPipelineOutput": "EditOutput"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from pbe.editing import pipeline

    return getattr(pipeline, THEIRS.get(name, name))
