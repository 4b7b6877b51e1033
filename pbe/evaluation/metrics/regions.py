"""How much the painted region resembles its exemplar: cosines of features, one of twenty, and layouts.

The cosines are the paper's, whose crop loses a row and a column, and corrected ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.nn import functional as F

from pbe.data.samples.crops import resize_area
from pbe.evaluation.metrics.base import (
    Batch,
    CaseMeasure,
    Measure,
    Metric,
    Outcome,
    Score,
    ScoreCard,
    by_case,
)
from pbe.evaluation.metrics.bootstrap import CHOICE, cosines, first_of
from pbe.evaluation.metrics.towers import Tower, region, to_grey

CORRECT_RULE = "bounding box of the mask's pixels above 127, whole; exemplars whole"
PAPER_RULE = (
    "from the first to the last pixel equal to 255 in raster order, the last row and column left out; "
    "exemplars whole"
)
PAPER_FILTER = "region: bilinear without antialias, once normalised; exemplar: Pillow's bicubic, before that"
FIRST_OF = f"toy-first-of-{CHOICE}"
FIRST_OF_SCORES = (FIRST_OF, f"{FIRST_OF}-grey", f"{FIRST_OF}-true", f"{FIRST_OF}-grey-true")
FIRST_OF_NOTES = (
    f"own exemplar before {CHOICE - 1} of other cases, drawn by place among the cases that were scored"
)


def raster_crop(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the crop ``(x1, y1, x2, y2)`` of a mask (uint8 ``h w``) as the paper's script makes it.

    Its corners are the first and the last pixel equal to 255 in raster order, and both ends are excluded
    though they belong to the masked region: right for boxes but for their last row and column, and possibly
    empty for other shapes.
    """
    white = np.argwhere(mask == 255)
    if not len(white):
        return 0, 0, 0, 0
    (y1, x1), (y2, x2) = white[0].tolist(), white[-1].tolist()
    return x1, y1, x2, y2


def paper_cosines(tower: Tower, batch: Batch) -> np.ndarray:
    """Return the paper's region similarity, a hundred times the cosine; NaN where its crop is empty."""
    size = tower.spec.size
    regions, kept = [], []
    for position, (case, edit) in enumerate(zip(batch.cases, batch.edits, strict=True)):
        x1, y1, x2, y2 = raster_crop(case.mask)
        if x2 <= x1 or y2 <= y1:
            continue
        cut = tower.normalise(edit)[None, :, y1:y2, x1:x2]
        regions.append(F.interpolate(cut, size=(size, size), mode="bilinear", align_corners=False)[0])
        kept.append(position)
    values = np.full(len(batch.cases), np.nan)
    if kept:
        values[kept] = 100.0 * cosines(tower.run(regions), _exemplars(tower, batch)[kept])
    return values


def correct_cosines(tower: Tower, batch: Batch) -> np.ndarray:
    """Return the cosine of the whole region's features with the exemplar's, both shown alike."""

    def make() -> np.ndarray:
        return tower.squashed([region(e, c.mask) for e, c in zip(batch.edits, batch.cases, strict=True)])

    return cosines(batch.shared(tower.key, "regions", make), _exemplars(tower, batch))


def _exemplars(tower: Tower, batch: Batch) -> np.ndarray:
    exemplars = [case.exemplar for case in batch.cases]
    return batch.shared(tower.key, "exemplars", lambda: tower.squashed(exemplars))


def region_measure(tower: Tower, scale: float = 1.0) -> CaseMeasure:
    """Make a region similarity with the corrected crop, ``scale`` (the paper's is 100) times the cosine."""
    notes = "cosine" if scale == 1.0 else f"cosine x {scale:g}"
    card = ScoreCard(tower.spec.architecture, tower.sha256, tower.squashed_filter, CORRECT_RULE, notes=notes)
    return CaseMeasure(lambda batch: scale * correct_cosines(tower, batch), card)


def paper_region_measure(tower: Tower) -> CaseMeasure:
    """Make the paper's region CLIP score, a hundred times the cosine."""
    card = ScoreCard(tower.spec.architecture, tower.sha256, PAPER_FILTER, PAPER_RULE, notes="cosine x 100")
    return CaseMeasure(lambda batch: paper_cosines(tower, batch), card)


class FirstOfMeasure(Measure):
    """Is the right exemplar the most similar of twenty? Of edits and true objects, in colour and in grey.

    It collects the features of regions and exemplars, and compares them when all are there.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.positions: list[int] = []
        self.exemplars: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self.regions: dict[str, list[np.ndarray]] = {name: [] for name in FIRST_OF_SCORES}

    def update(self, batch: Batch) -> None:
        """Make the features of a batch."""
        self.positions += batch.positions
        exemplars = [case.exemplar for case in batch.cases]
        pairs = list(zip(batch.cases, batch.edits, strict=True))
        edits = [region(edit, case.mask) for case, edit in pairs]
        true = [region(case.image, case.mask) for case, _ in pairs]
        for grey in (False, True):
            self.exemplars[grey].append(self._features(batch, "exemplars", exemplars, grey))
            names = FIRST_OF_SCORES[1::2] if grey else FIRST_OF_SCORES[::2]
            for name, view, parts in zip(names, ("regions", "true regions"), (edits, true), strict=True):
                self.regions[name].append(self._features(batch, view, parts, grey))

    def _features(self, batch: Batch, view: str, images: Sequence[np.ndarray], grey: bool) -> np.ndarray:
        def make() -> np.ndarray:
            return self.tower.squashed([to_grey(one) for one in images] if grey else images)

        return batch.shared(self.tower.key, f"{view}, grey" if grey else view, make)

    def finish(self, metric: Metric, outcome: Outcome) -> list[Score]:
        """Make the four scores; fewer cases than there are to choose from have none."""
        card = ScoreCard(
            self.tower.spec.architecture,
            self.tower.sha256,
            self.tower.squashed_filter,
            CORRECT_RULE,
            reference_sha256=outcome.cases_sha256,
            notes=FIRST_OF_NOTES,
        )
        count = len(self.positions)
        if count < CHOICE:
            return metric.not_run(f"needs at least {CHOICE} cases, not {count}", card)
        values = np.full((len(metric.scores), outcome.count), np.nan)
        for row, name in zip(values, metric.scores, strict=True):
            exemplars = np.concatenate(self.exemplars["grey" in name])
            row[self.positions] = first_of(np.concatenate(self.regions[name]), exemplars)
        return metric.case_scores(values, card, outcome)


GRID = 8
LAYOUT_NAMES = ("layout-copy", "layout-copy-true")
LAYOUT_CROP = "bounding box of the mask, both axes stretched; exemplars whole"
LAYOUT_COPY_CARD = ScoreCard(
    resize_filter=f"area, to {GRID} x {GRID}",
    crop_rule=LAYOUT_CROP,
    notes="correlation of the region's colour layout with the exemplar's, less that with the mirrored one's; "
    "0 = prefers neither, and is what to aim at",
)
LAYOUT_TRUE_CARD = ScoreCard(
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

    return CaseMeasure(measure, LAYOUT_COPY_CARD)


def layout_true_measure() -> CaseMeasure:
    """Make the measure ``layout-true``."""
    return CaseMeasure(by_case(layout_true), LAYOUT_TRUE_CARD)
