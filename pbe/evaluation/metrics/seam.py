"""Seam score: how much stronger the step across the mask's border is than in the real picture."""

from __future__ import annotations

import math

import numpy as np

from pbe.evaluation.metrics.measures import Batch, CaseMeasure
from pbe.evaluation.metrics.results import ScoreCard

FLOOR = 1.0  # squared grey levels; the rounding of bytes alone makes steps of that size
CARD = ScoreCard(
    crop_rule="pairs of neighbouring pixels on either side of the mask's border",
    notes="geometric mean of the ratio of squared steps, edit to real picture; 1 = no more seam than the "
    "real picture has, below 1 = smoother than it",
)


def border_energy(picture: np.ndarray, hole: np.ndarray) -> float:
    """Return the mean squared step across a hole's border, squared grey levels; NaN without a border.

    A step is the difference of two neighbouring pixels, one of which is in the hole; the mean is over
    all such pairs, along rows and columns, and the channels.

    Args:
        picture: uint8 ``h w 3``.
        hole: bool ``h w``.
    """
    total, count = 0.0, 0
    for axis in (0, 1):
        first, second = (_cut(hole, axis, part) for part in (slice(None, -1), slice(1, None)))
        across = first != second
        before = _cut(picture, axis, slice(None, -1))[across].astype(np.int64)
        after = _cut(picture, axis, slice(1, None))[across].astype(np.int64)
        total += float(np.sum((after - before) ** 2))
        count += before.size
    return total / count if count else math.nan


def _cut(array: np.ndarray, axis: int, part: slice) -> np.ndarray:
    return array[part] if axis == 0 else array[:, part]


def seam(image: np.ndarray, edit: np.ndarray, mask: np.ndarray) -> float:
    """Return the ratio of the border's energy in the edit to that in the real picture, both at least one.

    Args:
        image: the real picture, uint8 ``h w 3``.
        edit: uint8 ``h w 3``.
        mask: uint8 ``h w``, above 127 = repainted.

    Returns:
        1 where the edit has the real picture's step, more where its seam shows; NaN where the mask has
        no border inside the picture.
    """
    hole = mask > 127
    return (border_energy(edit, hole) + FLOOR) / (border_energy(image, hole) + FLOOR)


def seam_measure() -> CaseMeasure:
    """Make the measure ``seam``; its mean is geometric, since it is one of ratios."""

    def measure(batch: Batch) -> list[float]:
        pairs = zip(batch.cases, batch.edits, strict=True)
        return [math.log(seam(case.image, edit, case.mask)) for case, edit in pairs]

    return CaseMeasure("seam", "clean", "lower", measure, CARD, finish=math.exp, show=np.exp)
