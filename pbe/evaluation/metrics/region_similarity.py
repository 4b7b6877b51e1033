"""How much the painted region resembles its exemplar: cosines of features, as the paper's and corrected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch.nn import functional as F

from pbe.evaluation.metrics.features import region
from pbe.evaluation.metrics.measures import Batch, CaseMeasure
from pbe.evaluation.metrics.results import Family, ScoreCard
from pbe.evaluation.metrics.towers import Tower

CORRECT_RULE = "bounding box of the mask's pixels above 127, whole; exemplars whole"
PAPER_RULE = (
    "from the first to the last pixel equal to 255 in raster order, the last row and column left out; "
    "exemplars whole"
)
PAPER_FILTER = "region: bilinear without antialias, once normalised; exemplar: Pillow's bicubic, before that"


def raster_crop(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the crop of the paper's script, ``(x1, y1, x2, y2)`` with the ends left out.

    Its corners are the first and the last pixel equal to 255 in raster order, and both ends are excluded
    though they belong to the hole: right for boxes but for their last row and column, and possibly
    empty for other shapes.

    Args:
        mask: uint8 ``h w`` with at least one pixel of 255, else the crop is empty.
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
        shown = _exemplars(tower, batch)[kept]
        values[kept] = 100.0 * cosines(tower.run(regions), shown)
    return values


def correct_cosines(tower: Tower, batch: Batch) -> np.ndarray:
    """Return the cosine of the whole region's features with the exemplar's, both shown alike."""

    def make() -> np.ndarray:
        return tower.squashed([region(e, c.mask) for e, c in zip(batch.edits, batch.cases, strict=True)])

    shown = batch.shared(tower.key, "regions", make)
    return cosines(shown, _exemplars(tower, batch))


def _exemplars(tower: Tower, batch: Batch) -> np.ndarray:
    pictures = [case.exemplar for case in batch.cases]
    return batch.shared(tower.key, "exemplars", lambda: tower.squashed(pictures))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosines of matching rows, ``(n,)`` float64; NaN where a row is zero or not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.sum(a * b, axis=1) / np.where(lengths > 0.0, lengths, np.nan)


def region_measure(name: str, family: Family, tower: Tower) -> CaseMeasure:
    """Make a region similarity with the corrected crop, between -1 and 1."""
    return _measure(name, family, tower, correct_cosines, CORRECT_RULE, tower.squashed_filter, "cosine")


def paper_region_measure(name: str, tower: Tower) -> CaseMeasure:
    """Make the paper's region CLIP score, or (``region-clip-corrected``) the corrected one, both x 100."""
    if name == "region-clip":
        return _measure(name, "paper", tower, paper_cosines, PAPER_RULE, PAPER_FILTER, "cosine x 100")

    def corrected(tower: Tower, batch: Batch) -> np.ndarray:
        return 100.0 * correct_cosines(tower, batch)

    return _measure(name, "paper", tower, corrected, CORRECT_RULE, tower.squashed_filter, "cosine x 100")


def _measure(
    name: str,
    family: Family,
    tower: Tower,
    measure: Callable[[Tower, Batch], Sequence[float] | np.ndarray],
    rule: str,
    resize: str,
    notes: str,
) -> CaseMeasure:
    card = ScoreCard(tower.spec.architecture, tower.sha256, resize, rule, notes=notes)
    return CaseMeasure(name, family, "higher", lambda batch: measure(tower, batch), card)
