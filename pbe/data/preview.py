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
from pbe.data.dataset import AnnotatedImage, ExemplarDataset
from pbe.data.samples.crops import Box, resize
from pbe.data.samples.decode import UnusableImageError
from pbe.data.samples.masks import ObjectMask
from pbe.data.samples.sample import TrainingSample, cut_exemplar, make_sample

TILE = 160
GREY = 128  # what the masked region of a masked image holds
COLUMNS = (
    "source and box", "exemplar", "augmented", "rectangle", "arbitrary", "masked image", "latent mask",
    "target",
)  # fmt: skip
# Where the objects' own masks may be drawn; a sample whose object has none shows an empty one.
OBJECT_COLUMNS = (*COLUMNS[:5], "object", *COLUMNS[5:])
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; background: #fff; color: #222; }
table { border-collapse: collapse; } th, td { padding: 3px; text-align: left; vertical-align: top; }
img { display: block; image-rendering: pixelated; background: #eee; } .note { color: #666; max-width: 12rem; }
th.chosen, td.chosen { background: #dff0d8; }
"""


@dataclass(frozen=True)
class SheetRow:
    """One sample: its place, what is to be said about it, its images and which mask was drawn.

    Attributes:
        index: global counter.
        key: name of the image; empty where none was found.
        notes: kind of mask, events, what was skipped.
        tiles: uint8 ``h w 3`` or ``h w``, one for each of ``columns``; none where no sample was made.
        mask_kind: the column of the mask that training gets.
        columns: :data:`COLUMNS` or :data:`OBJECT_COLUMNS`.
    """

    index: int
    key: str
    notes: Sequence[str]
    tiles: Sequence[np.ndarray]
    mask_kind: str = ""
    columns: Sequence[str] = COLUMNS


def _source(annotated: AnnotatedImage, box: Box) -> np.ndarray:
    image = annotated.image
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    small = resize(image, max(round(width * scale), 1), max(round(height * scale), 1))
    corners = [round(value * scale) for value in (box.x1, box.y1, box.x2, box.y2)]
    return cv2.rectangle(small.copy(), tuple(corners[:2]), tuple(corners[2:]), (255, 0, 80), 2)


def _tiles(
    annotated: AnnotatedImage,
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
    masks = {kind: sample.mask for kind, sample in samples.items()}
    if "object" in samples and samples["object"].mask_kind != "object":
        masks["object"] = np.zeros_like(drawn.mask)
    masks[drawn.mask_kind] = drawn.mask
    return [_source(annotated, box), before, drawn.exemplar, *masks.values(), masked, bigger, drawn.image]


def _draw(
    dataset: ExemplarDataset, turn: int, epoch: int, attempt: int, factor: int
) -> tuple[str, TrainingSample, list[np.ndarray]]:
    """Return the image's key, the sample that training gets and the tiles of its row."""
    config, usual = dataset.config, dataset.config.sample
    annotated, box, rng = dataset.choose(turn, epoch, attempt)
    own = dataset.object_mask(turn, annotated, box)

    def make(mask: ObjectMask | None, settings: SampleConfig) -> TrainingSample:
        sizes = config.image_size, config.exemplar_size
        return make_sample(annotated.image, box, copy.deepcopy(rng), settings, *sizes, mask)

    drawn = make(own, usual)
    # With no mask to read, the draws stay those of the object's.
    shares = {"rectangle": 0.0, "arbitrary": 1.0}
    samples = {
        kind: make(None, dataclasses.replace(usual, arbitrary_mask_share=share))
        for kind, share in shares.items()
    }
    if usual.object_mask_share:
        samples["object"] = make(own, dataclasses.replace(usual, object_mask_share=1.0))
    return annotated.key, drawn, _tiles(annotated, box, samples, drawn, factor)


def make_row(dataset: ExemplarDataset, index: int, factor: int) -> SheetRow:
    """Return the row of a global counter; skips stand-ins as training does.

    Args:
        dataset: of one stream.
        index: ``epoch * len(dataset) + position``.
        factor: pixels a latent.
    """
    notes: list[str] = []
    for attempt, turn in enumerate(dataset.turns(index)):
        try:
            key, drawn, tiles = _draw(dataset, turn, index // len(dataset), attempt, factor)
        except UnusableImageError as skip:
            notes.append(f"skipped: {skip.reason}")
            continue
        masked = cv2.countNonZero(drawn.mask) / drawn.mask.size
        notes += [f"{drawn.mask_kind} mask, {masked:.0%} masked", *drawn.events]
        columns = OBJECT_COLUMNS if dataset.config.sample.object_mask_share else COLUMNS
        return SheetRow(index, key, notes, tiles, drawn.mask_kind, columns)
    return SheetRow(index, "", [*notes[:3], "no usable image found"], [])


def _image(image: np.ndarray) -> str:
    scale = TILE / max(image.shape[:2])
    if scale < 1:
        height, width = (max(round(side * scale), 1) for side in image.shape[:2])
        image = resize(image, width, height)
    channels = cv2.COLOR_RGB2BGR if image.ndim == 3 else cv2.COLOR_GRAY2BGR
    encoded = cv2.imencode(".png", cv2.cvtColor(image, channels))[1].tobytes()
    size = f'width="{max(1, round(image.shape[1] * max(scale, 1)))}"'
    return f'<img {size} alt="" src="data:image/png;base64,{base64.b64encode(encoded).decode()}">'


def sheet_html(title: str, facts: Sequence[str], rows: Sequence[SheetRow]) -> str:
    """Return the page; the same rows give the same bytes.

    Args:
        title: of the page.
        facts: lines above the table.
        rows: of :func:`make_row`.
    """
    columns = max((row.columns for row in rows), key=len, default=COLUMNS)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("sample", *columns))
    lines = []
    for row in rows:
        notes = "<br>".join(html.escape(text) for text in (f"{row.index}: {row.key}", *row.notes))
        cells = "".join(
            f"<td{' class=chosen' if name == row.mask_kind else ''}>{_image(tile)}</td>"
            for name, tile in zip(row.columns, row.tiles, strict=bool(row.tiles))
        )
        lines.append(f'<tr><td class="note">{notes}</td>{cells}</tr>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        + "".join(f"<p>{html.escape(fact)}</p>" for fact in facts)
        + f"<table><tr>{head}</tr>{''.join(lines)}</table></html>\n"
    )
