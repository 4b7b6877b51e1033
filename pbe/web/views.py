"""Pieces of HTML that the page shows; ``static/page.js`` brings them to life."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from pbe.web.app import EXAMPLES, Result
from pbe.web.records import data_url
from pbe.web.service import Edit, EditService

PREVIEW_SIDE = 512
TOOLS = (
    ("brush", "Brush", "Paint the mask (B)"),
    ("eraser", "Eraser", "Take away from the mask (E)"),
    ("box", "Box", "Drag a box that is masked (X)"),
)
TITLES = {
    "image": ("Image", "Brush over what is to be replaced."),
    "exemplar": ("Exemplar", "Drag a box close around the object."),
    "result": ("Result", "Hold C to see the image before."),
}


def header(model: str) -> str:
    """Return the top of the page."""
    return (
        '<header class="pbe-header"><h1>Paint by Example</h1><p>Mask a part of an image, show an exemplar, and it '
        f'is painted in. Model: <strong>{escape(model)}</strong>. Scripts: <a href="docs">the API</a>.</p></header>'
    )


def title(kind: str) -> str:
    """Return the heading of a board or of the result."""
    name, help_text = TITLES[kind]
    return f'<div class="pbe-title"><h2>{name}</h2><p>{help_text}</p></div>'


def board(kind: str) -> str:
    """Return a board to paint a mask on (``image``) or to crop on (``exemplar``)."""
    name = TITLES[kind][0]
    several = " multiple" if kind == "exemplar" else ""
    tools = (
        _mask_tools() if kind == "image" else '<button type="button" data-act="whole">Whole image</button>'
    )
    return f"""
<section class="pbe-board" data-kind="{kind}" aria-label="{name}">
  {title(kind)}
  <div class="pbe-tools" role="toolbar" aria-label="{name}: tools">
    <label class="pbe-button">Open<input type="file" accept="image/*" data-file="{kind}"{several}></label>
    {tools}
  </div>
  <div class="pbe-stage" tabindex="0" role="application" aria-label="{name}: drawing area. Arrow keys move, \
space paints or sets the corners of a box.">
    <canvas class="pbe-image"></canvas><canvas class="pbe-mask"></canvas><canvas class="pbe-over"></canvas>
    <p class="pbe-empty">Drop an image here, paste one, or press Open.</p>
  </div>
  <div class="pbe-strip" aria-label="Exemplars"></div>
  <p class="pbe-said" role="status" aria-live="polite"></p>
</section>"""


def _mask_tools() -> str:
    buttons = "".join(
        f'<button type="button" data-tool="{name}" aria-pressed="{str(name == "brush").lower()}" title="{tip}">'
        f"{label}</button>"
        for name, label, tip in TOOLS
    )
    return f"""{buttons}
    <label class="pbe-size" title="Size of the brush ([ and ], or the wheel)">Size
      <input type="range" min="1" max="100" value="30" data-size></label>
    <button type="button" data-act="undo" title="Undo (Ctrl+Z)">Undo</button>
    <button type="button" data-act="redo" title="Redo (Ctrl+Shift+Z)">Redo</button>
    <button type="button" data-act="clear" title="Remove the mask">Clear</button>
    <label class="pbe-button" title="A finished mask, white = repaint">Open mask<input type="file" \
accept="image/*" data-file="mask"></label>"""


def examples() -> str:
    """Return the row of examples; a click loads one and runs it."""
    buttons = "".join(
        f'<button type="button" data-example="{number}" aria-label="Example {number + 1}: load and paint">'
        f'<img alt="" src="examples/{number}/image.png"><img alt="" src="examples/{number}/exemplar.png"></button>'
        for number in range(EXAMPLES)
    )
    return (
        f'<section class="pbe-examples" aria-label="Examples"><h2>Examples</h2><div>{buttons}</div></section>'
    )


def _panel(content: str) -> str:
    return f'<section class="pbe-results" aria-label="Result">{content}</section>'


def waiting() -> str:
    """Return the panel before the first edit."""
    return _panel('<div class="pbe-stage"><p class="pbe-empty">The edit appears here.</p></div>')


def problem(text: str) -> str:
    """Return the panel with what went wrong."""
    return _panel(f'<div class="pbe-stage"><p class="pbe-problem" role="alert">{escape(text)}</p></div>')


def running(edits: Sequence[Edit], service: EditService) -> str:
    """Return the panel of edits that wait or run."""
    current = next((edit for edit in edits if not edit.done.done()), edits[-1])
    if not current.steps:
        ahead = service.ahead_of(current)
        return progress(f"Waiting, {ahead} edits ahead" if ahead else "Starting", 0, 0, None)
    number = f"Edit {edits.index(current) + 1} of {len(edits)}: " if len(edits) > 1 else ""
    step = min(current.step, current.steps)
    return progress(f"{number}step {step} of {current.steps}", step, current.steps, current.preview)


def progress(text: str, step: int, steps: int, preview: np.ndarray | None) -> str:
    """Return the panel with a bar and, where there is one, the present estimate, uint8 ``h w 3``."""
    shown = '<p class="pbe-empty">A first look comes after a few steps.</p>'
    if preview is not None:
        image = Image.fromarray(preview)
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=85)
        shown = (
            f'<img class="pbe-fit" alt="Estimate so far" src="{data_url(buffer.getvalue(), "image/webp")}">'
        )
    bar = f'value="{step}" max="{steps}"' if steps else ""
    return _panel(
        f'<div class="pbe-stage">{shown}</div><label class="pbe-progress"><span role="status">{escape(text)}</span>'
        f"<progress {bar}></progress></label>"
    )


def results(source: str, names: Sequence[str], made: Sequence[Result], remarks: Sequence[str]) -> str:
    """Return the panel with a viewer for each edit, and a row to choose from where there are several."""
    figures = "".join(
        _figure(source, name, each, hidden=index > 0)
        for index, (name, each) in enumerate(zip(names, made, strict=True))
    )
    thumbs = "".join(
        f'<button type="button" data-show="{index}" aria-pressed="{str(index == 0).lower()}" '
        f'aria-label="Edit {index + 1}, seed {each.edit.settings.seed}">'
        f'<img class="pbe-thumb" alt="" src="files/{name}.png"></button>'
        for index, (name, each) in enumerate(zip(names, made, strict=True))
    )
    row = f'<div class="pbe-strip" aria-label="Edits">{thumbs}</div>' if len(names) > 1 else ""
    told = "".join(f'<p class="pbe-hint" role="status">{escape(each)}</p>' for each in remarks)
    return _panel(f"{figures}{row}{told}")


def _figure(source: str, name: str, result: Result, *, hidden: bool) -> str:
    source, seed = escape(source, quote=True), result.edit.settings.seed
    black = " The safety checker blackened it." if result.record["blackened"] else ""
    return f"""
<figure{" hidden" if hidden else ""}>
  <div class="pbe-stage pbe-compare">
    <img class="pbe-fit" alt="The image before" src="files/{source}.png">
    <img class="pbe-fit pbe-after" alt="The edit" src="files/{name}.png">
    <input type="range" min="0" max="100" value="0" aria-label="How much of the image before is shown">
  </div>
  <figcaption>Seed {seed}.{black}</figcaption>
  <div class="pbe-tools">
    <a class="pbe-button" href="files/{name}.png" download="edit_{seed}.png">Download</a>
    <a class="pbe-button" href="files/{name}.zip" download="edit_{seed}.zip" \
title="The edit, image, mask, exemplar and settings">With mask and settings</a>
    <button type="button" data-use="{name}" title="Edit this result further">Go on from here</button>
  </div>
  <details><summary>Command that repeats it</summary>
    <p>Run it in the folder of the archive "With mask and settings"; it gives the same bytes on this machine.</p>
    <pre tabindex="0">{escape(result.record["repeat"])}</pre></details>
  <details><summary>Settings</summary><pre tabindex="0">{escape(json.dumps(result.record, indent=2))}</pre></details>
</figure>"""
