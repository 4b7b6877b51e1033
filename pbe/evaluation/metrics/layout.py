"""Layout scores: where the painted region's colours lie, against the exemplar as it is and mirrored.

The copy-paste score asks how much of the region's detail some warp of the exemplar explains; a model that
copies blurredly, or has learned little else yet, hardly moves it. Colours on a coarse grid do: the region
of a model that copies agrees with its exemplar as it stands, and agrees less with the mirrored one. A model
that only knows *what* the exemplar shows has no reason to prefer either, and scores 0. That is the value to
aim at: below it stands who copies the mirror image. Who ignores the exemplar scores 0 as well, so the score
says nothing alone; whether the exemplar decided anything is another question (similarity, exemplar AUC).
"""

from __future__ import annotations

import numpy as np

from pbe.data.samples.crops import resize_area
from pbe.evaluation.metrics.base import Batch, CaseMeasure, ScoreCard, by_case
from pbe.evaluation.metrics.features import region

GRID = 8
NAMES = ("layout-copy", "layout-copy-true")
CROP = "bounding box of the mask, both axes stretched; exemplars whole"
COPY_CARD = ScoreCard(
    resize_filter=f"area, to {GRID} x {GRID}",
    crop_rule=CROP,
    notes="correlation of the region's colour layout with the exemplar's, less that with the mirrored one's; "
    "0 = prefers neither, and is what to aim at",
)
TRUE_CARD = ScoreCard(
    resize_filter=f"area, to {GRID} x {GRID}",
    crop_rule="bounding box of the mask",
    notes="correlation of the region's colour layout with the real image's",
)


def layout(image: np.ndarray) -> np.ndarray:
    """Return an image's colours on the grid less each channel's mean, float64 ``(8, 8, 3)``."""
    small = resize_area(image, GRID, GRID).astype(np.float64)
    return small - small.mean(axis=(0, 1))


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two layouts, -1 to 1; 0 where one of them is a single colour."""
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.sum(first * second)) / size if size else 0.0


def layout_copy(part: np.ndarray, exemplar: np.ndarray) -> float:
    """Return how much more a region's layout is the exemplar's than the mirrored exemplar's, -2 to 2."""
    own, shown = layout(part), layout(exemplar)
    return agreement(own, shown) - agreement(own, shown[:, ::-1])


def layout_true(image: np.ndarray, edit: np.ndarray, mask: np.ndarray) -> float:
    """Return the correlation of an edit's layout inside the mask's box with the real image's, -1 to 1."""
    return agreement(layout(region(edit, mask)), layout(region(image, mask)))


def layout_copy_measure() -> CaseMeasure:
    """Make ``layout-copy`` of the edits, and ``layout-copy-true`` of the true objects."""

    def measure(batch: Batch) -> np.ndarray:
        pairs = zip(batch.cases, batch.edits, strict=True)
        rows = [
            [layout_copy(region(image, case.mask), case.exemplar) for image in (edit, case.image)]
            for case, edit in pairs
        ]
        return np.array(rows)

    return CaseMeasure(measure, COPY_CARD)


def layout_true_measure() -> CaseMeasure:
    """Make the measure ``layout-true``."""
    return CaseMeasure(by_case(layout_true), TRUE_CARD)
