"""A page of what the model will see: samples with everything that led to them, as one HTML file."""

from __future__ import annotations

import base64
import copy
import dataclasses
import html
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pbe.config import SampleConfig
from pbe.data.crops import resize
from pbe.data.dataset import AnnotatedPicture, ExemplarDataset, UnusablePictureError
from pbe.data.masks import Box
from pbe.data.sample import TrainingSample, cut_exemplar, make_sample

TILE = 160
GREY = 128  # what the hole of a masked image holds
COLUMNS = (
    "source and box", "exemplar", "augmented", "rectangle", "arbitrary", "masked image", "latent mask",
    "target",
)  # fmt: skip
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; background: #fff; color: #222; }
table { border-collapse: collapse; } th, td { padding: 3px; text-align: left; vertical-align: top; }
img { display: block; image-rendering: pixelated; background: #eee; } .note { color: #666; max-width: 12rem; }
th.chosen, td.chosen { background: #dff0d8; }
"""


@dataclass(frozen=True)
class SheetRow:
    """One sample: its place, what is to be said about it, its pictures and which mask was drawn.

    Attributes:
        index: global counter.
        key: name of the picture; empty where none was found.
        notes: kind of mask, events, what was skipped.
        tiles: uint8 ``h w 3`` or ``h w``, one for each of :data:`COLUMNS`; none where no sample was made.
        mask_kind: the column of the mask that training gets.
    """

    index: int
    key: str
    notes: Sequence[str]
    tiles: Sequence[np.ndarray]
    mask_kind: str = ""


def _source(annotated: AnnotatedPicture, box: Box) -> np.ndarray:
    picture = annotated.image
    height, width = picture.shape[:2]
    scale = TILE / max(height, width)
    small = resize(picture, max(round(width * scale), 1), max(round(height * scale), 1))
    corners = [round(value * scale) for value in (box.x1, box.y1, box.x2, box.y2)]
    return cv2.rectangle(small.copy(), tuple(corners[:2]), tuple(corners[2:]), (255, 0, 80), 2)


def _tiles(
    annotated: AnnotatedPicture,
    box: Box,
    samples: dict[str, TrainingSample],
    drawn: TrainingSample,
    factor: int,
) -> list[np.ndarray]:
    size, latent = drawn.image.shape[0], max(drawn.image.shape[0] // factor, 1)
    before = resize(cut_exemplar(annotated.image, box, 0), TILE, TILE)
    masked = np.where(drawn.mask[..., None] > 0, np.uint8(GREY), drawn.image)
    # Bilinear without antialias, 1 = keep: what the network gets.
    keep = cv2.resize(255 - drawn.mask, (latent, latent), interpolation=cv2.INTER_LINEAR)
    bigger = cv2.resize(keep, (size, size), interpolation=cv2.INTER_NEAREST)
    masks = [samples[kind].mask for kind in ("rectangle", "arbitrary")]
    return [_source(annotated, box), before, drawn.exemplar, *masks, masked, bigger, drawn.image]


def make_row(dataset: ExemplarDataset, index: int, factor: int) -> SheetRow:
    """Return the row of a global counter; skips stand-ins as training does.

    Args:
        dataset: of one stream.
        index: ``epoch * len(dataset) + position``.
        factor: pixels a latent.
    """
    config, notes = dataset.config, list[str]()
    for attempt, turn in enumerate(dataset.turns(index)):
        try:
            annotated, box, rng = dataset.choose(turn, index // len(dataset), attempt)
        except UnusablePictureError as skip:
            notes.append(f"skipped: {skip.reason}")
            continue

        def make(settings: SampleConfig) -> TrainingSample:
            again = copy.deepcopy(rng)  # noqa: B023 (called in this turn only)
            return make_sample(
                annotated.image, box, again, settings, config.image_size, config.exemplar_size  # noqa: B023
            )  # fmt: skip

        drawn = make(config.sample)
        shares = {"rectangle": 0.0, "arbitrary": 1.0}
        samples = {
            kind: make(dataclasses.replace(config.sample, arbitrary_mask_share=share))
            for kind, share in shares.items()
        }
        tiles = _tiles(annotated, box, samples, drawn, factor)
        hole = cv2.countNonZero(drawn.mask) / drawn.mask.size
        notes += [f"{drawn.mask_kind} mask, hole {hole:.0%}", *drawn.events]
        return SheetRow(index, annotated.key, notes, tiles, drawn.mask_kind)
    return SheetRow(index, "", [*notes[:3], "no usable picture found"], [])


def _image(picture: np.ndarray) -> str:
    scale = TILE / max(picture.shape[:2])
    if scale < 1:
        height, width = (max(round(side * scale), 1) for side in picture.shape[:2])
        picture = resize(picture, width, height)
    channels = cv2.COLOR_RGB2BGR if picture.ndim == 3 else cv2.COLOR_GRAY2BGR
    encoded = cv2.imencode(".png", cv2.cvtColor(picture, channels))[1].tobytes()
    size = f'width="{max(1, round(picture.shape[1] * max(scale, 1)))}"'
    return f'<img {size} alt="" src="data:image/png;base64,{base64.b64encode(encoded).decode()}">'


def sheet_html(title: str, facts: Sequence[str], rows: Sequence[SheetRow]) -> str:
    """Return the page; the same rows give the same bytes.

    Args:
        title: of the page.
        facts: lines above the table.
        rows: of :func:`make_row`.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("sample", *COLUMNS))
    lines = []
    for row in rows:
        notes = "<br>".join(html.escape(text) for text in (f"{row.index}: {row.key}", *row.notes))
        cells = "".join(
            f"<td{' class=chosen' if name == row.mask_kind else ''}>{_image(tile)}</td>"
            for name, tile in zip(COLUMNS, row.tiles, strict=bool(row.tiles))
        )
        lines.append(f'<tr><td class="note">{notes}</td>{cells}</tr>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        + "".join(f"<p>{html.escape(fact)}</p>" for fact in facts)
        + f"<table><tr>{head}</tr>{''.join(lines)}</table></html>\n"
    )
