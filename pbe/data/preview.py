"""A page of what the model will see: samples with everything that led to them, as one HTML file."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pbe.config import SampleConfig
from pbe.data.dataset import ExemplarDataset
from pbe.data.samples.crops import resize
from pbe.data.samples.decode import UnusableImageError
from pbe.data.samples.masks import ObjectMask
from pbe.data.samples.sample import TrainingSample, cut_exemplar, make_sample
from pbe.html import render_page

TILE = 160
GREY = 128  # what the masked region of a masked image holds
COLUMNS = (
    "source and box", "exemplar", "augmented", "rectangle", "arbitrary", "masked image", "latent mask",
    "target",
)  # fmt: skip
# Where the objects' own masks may be drawn; a sample whose object has none shows an empty one.
OBJECT_COLUMNS = (*COLUMNS[:5], "object", *COLUMNS[5:])


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

    def cells(self) -> Iterator[tuple[str, np.ndarray, int]]:
        """Yield column, image and the width that it is shown at; no image is larger than a tile."""
        for name, image in zip(self.columns, self.tiles, strict=bool(self.tiles)):
            small = _within_tile(image)
            yield name, small, max(round(small.shape[1] * TILE / max(small.shape[:2])), 1)


def _within_tile(image: np.ndarray) -> np.ndarray:
    scale = TILE / max(image.shape[:2])
    height, width = (max(round(side * scale), 1) for side in image.shape[:2])
    return resize(image, width, height) if scale < 1 else image


def make_row(dataset: ExemplarDataset, index: int, factor: int) -> SheetRow:
    """Return the row of a global counter, ``epoch * len(dataset) + position``.

    Images of no use are skipped as training does. A latent stands for ``factor`` pixels along a side.
    """
    notes: list[str] = []
    columns = OBJECT_COLUMNS if dataset.config.sample.object_mask_share else COLUMNS
    for attempt, turn in enumerate(dataset.turns(index)):
        try:
            key, drawn, tiles = _draw(dataset, turn, index // len(dataset), attempt, factor)
        except UnusableImageError as skip:
            notes.append(f"skipped: {skip.reason}")
            continue
        masked = cv2.countNonZero(drawn.mask) / drawn.mask.size
        notes += [f"{drawn.mask_kind} mask, {masked:.0%} masked", *drawn.events]
        return SheetRow(index, key, notes, tiles, drawn.mask_kind, columns)
    return SheetRow(index, "", [*notes[:3], "no usable image found"], [])


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
    masks = {
        kind: make(None, dataclasses.replace(usual, arbitrary_mask_share=share)).mask
        for kind, share in shares.items()
    }
    if usual.object_mask_share:
        sample = make(own, dataclasses.replace(usual, object_mask_share=1.0))
        masks["object"] = sample.mask if sample.mask_kind == "object" else np.zeros_like(drawn.mask)
    masks[drawn.mask_kind] = drawn.mask
    size, latent = drawn.image.shape[0], max(drawn.image.shape[0] // factor, 1)
    masked = np.where(drawn.mask[..., None] > 0, np.uint8(GREY), drawn.image)
    # Bilinear without antialias, 1 = keep: what the network gets.
    keep = cv2.resize(255 - drawn.mask, (latent, latent), interpolation=cv2.INTER_LINEAR)
    bigger = cv2.resize(keep, (size, size), interpolation=cv2.INTER_NEAREST)
    height, width = annotated.image.shape[:2]
    scale = TILE / max(height, width)
    source = resize(annotated.image, max(round(width * scale), 1), max(round(height * scale), 1)).copy()
    corners = [round(value * scale) for value in (box.x1, box.y1, box.x2, box.y2)]
    cv2.rectangle(source, tuple(corners[:2]), tuple(corners[2:]), (255, 0, 80), 2)
    before = resize(cut_exemplar(annotated.image, box, 0), TILE, TILE)
    tiles = [source, before, drawn.exemplar, *masks.values(), masked, bigger, drawn.image]
    return annotated.key, drawn, tiles


def sheet_html(title: str, facts: Sequence[str], rows: Sequence[SheetRow]) -> str:
    """Return the page, with the facts as lines above the table; the same rows give the same bytes."""
    columns = max((row.columns for row in rows), key=len, default=COLUMNS)
    template = Path(__file__).with_name("preview.html.j2")
    return render_page(template, title=title, facts=facts, rows=rows, columns=("sample", *columns))
