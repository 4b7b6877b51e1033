"""What reports are made of: tables of texts, and sheets of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pbe.data.samples.crops import resize

LABEL_WIDTH = 132
GAP = 2
BAND_GAP = 14
PAPER = (255, 255, 255)
INK = (30, 30, 30)


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        head: names of the columns.
        rows: cells; the first one names the row.
        note: below the table.
        title: above it.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    title: str = ""


def markdown(table: Table) -> str:
    """Return a table with its note, without its title, as Markdown."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    text = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return f"{text}\n\n{table.note}\n" if table.note else f"{text}\n"


def at_side(image: np.ndarray, side: int) -> np.ndarray:
    """Return an image (uint8 ``h w 3``) as a square of ``side`` pixels.

    Small ones are enlarged by Lanczos' filter, which shows a person more of a small image than blocks do or
    bilinear interpolation does; large ones are averaged down.
    """
    if side <= max(image.shape[:2]):
        return resize(image, side, side)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def sheet(rows: Mapping[str, Sequence[np.ndarray]], *, tile: int = 96, columns: int = 16) -> np.ndarray:
    """Draw rows of images under each other, in bands of ``columns`` cases; return uint8 ``h w 3``.

    Args:
        rows: label to images (uint8 ``h w 3`` squares of any size), equally many in each row.
        tile: side of an image on the sheet, pixels.
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
        for line, (label, images) in enumerate(rows.items()):
            y = depth * band_height + line * (tile + GAP)
            draw.text((4, y + tile // 2 - 8), label, fill=INK, font=font)
            for column, index in enumerate(band):
                tile_image = Image.fromarray(at_side(images[index], tile))
                page.paste(tile_image, (LABEL_WIDTH + column * (tile + GAP), y))
    return np.asarray(page)
