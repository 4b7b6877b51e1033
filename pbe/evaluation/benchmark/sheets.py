"""Picture sheets: the same cases side by side, a row for each kind of picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pbe.data.samples.crops import resize
from pbe.evaluation.benchmark.toy import BenchmarkCase
from pbe.evaluation.benchmark.toy_edits import BenchmarkEdits

LABEL_WIDTH = 132
GAP = 2
BAND_GAP = 14
PAPER = (255, 255, 255)
INK = (30, 30, 30)


def benchmark_rows(cases: Sequence[BenchmarkCase], edits: BenchmarkEdits) -> dict[str, list[np.ndarray]]:
    """Return labelled rows: masked scene, exemplar, edits by guidance, the shuffled pair, true object."""
    last = list(edits.own)[-1]
    rows = {"masked": [case.masked for case in cases], "exemplar": [case.exemplar for case in cases]}
    rows |= {f"guidance {scale:g}": list(edited) for scale, edited in edits.own.items()}
    rows["shuffled exemplar"] = [cases[i].exemplar for i in edits.partner]
    rows[f"its edit, guidance {last:g}"] = list(edits.shuffled[last])
    rows["source: true object"] = [case.image for case in cases]
    return rows


def edit_rows(cases: Sequence[BenchmarkCase], edits: BenchmarkEdits) -> dict[str, list[np.ndarray]]:
    """Return four rows: masked scene, exemplar, edit at the last guidance scale, true object."""
    rows, scale = benchmark_rows(cases, edits), list(edits.own)[-1]
    named = {"masked": "masked", "exemplar": "exemplar", f"guidance {scale:g}": "edit"}
    return {name: rows[label] for label, name in named.items()} | {"hidden": rows["source: true object"]}


def at_side(picture: np.ndarray, side: int) -> np.ndarray:
    """Return an image (uint8 ``h w 3``) as a square of ``side`` pixels.

    Small ones are enlarged by Lanczos' filter, which shows a person more of a small image than blocks do or
    bilinear interpolation does; large ones are averaged down.
    """
    if side <= max(picture.shape[:2]):
        return resize(picture, side, side)
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def sheet(rows: Mapping[str, Sequence[np.ndarray]], *, tile: int = 96, columns: int = 16) -> np.ndarray:
    """Draw rows of pictures under each other, in bands of ``columns`` cases; return uint8 ``h w 3``.

    Args:
        rows: label to pictures (uint8 ``h w 3`` squares of any size), equally many in each row.
        tile: side of a picture on the sheet, pixels.
        columns: cases side by side before a new band begins.
    """
    count = len(next(iter(rows.values())))
    bands = [range(i, min(i + columns, count)) for i in range(0, count, columns)]
    band_height = len(rows) * (tile + GAP) + BAND_GAP
    width = LABEL_WIDTH + min(columns, count) * (tile + GAP)
    page = Image.new("RGB", (width, band_height * len(bands)), PAPER)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(12)
    for depth, band in enumerate(bands):
        for line, (label, pictures) in enumerate(rows.items()):
            y = depth * band_height + line * (tile + GAP)
            draw.text((4, y + tile // 2 - 8), label, fill=INK, font=font)
            for column, index in enumerate(band):
                picture = Image.fromarray(at_side(pictures[index], tile))
                page.paste(picture, (LABEL_WIDTH + column * (tile + GAP), y))
    return np.asarray(page)
