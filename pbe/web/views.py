"""The pieces of HTML that the page shows, filled in; they stand in ``parts.html.j2``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from pbe.html import small_uri
from pbe.web.app import Result
from pbe.web.service import Edit, EditService

PREVIEW_SIDE = 512
_LOADER = FileSystemLoader(Path(__file__).parent)
_PARTS: Any = (
    Environment(
        loader=_LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    .get_template("parts.html.j2")
    .module
)


def part(name: str, *values: Any) -> str:
    """Return a piece by the name of its macro."""
    return str(getattr(_PARTS, name)(*values))


def running(edits: Sequence[Edit], service: EditService) -> str:
    """Return the panel of edits that wait or run."""
    current = next((edit for edit in edits if not edit.done.done()), edits[-1])
    if not current.steps:
        ahead = service.ahead_of(current)
        return part("progress", f"Waiting, {ahead} edits ahead" if ahead else "Starting", 0, 0, None)
    number = f"Edit {edits.index(current) + 1} of {len(edits)}: " if len(edits) > 1 else ""
    step = min(current.step, current.steps)
    text, preview = f"{number}step {step} of {current.steps}", current.preview
    return part("progress", text, step, current.steps, None if preview is None else _preview(preview))


def _preview(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return small_uri(np.asarray(image))


def results(
    source: str, names: Sequence[str], made: Sequence[Result], remarks: Sequence[str], *, wider: bool
) -> str:
    """Return the panel with a viewer for each edit, and a row to choose from where there are several.

    ``source`` and ``names`` are what the image and the edits are called in the store; with
    ``wider`` remarks offer more room around the mask.
    """
    rows = [
        (name, each.edit.settings.seed, each.record, json.dumps(each.record, indent=2))
        for name, each in zip(names, made, strict=True)
    ]
    return part("results", source, rows, remarks, wider)
