"""Colour shift: how far the mean colour of the edit lies from that of the real picture, in CIELAB."""

from __future__ import annotations

import cv2
import numpy as np

from pbe.evaluation.metrics.measures import Batch, CaseMeasure
from pbe.evaluation.metrics.results import ScoreCard

NOTES = "distance of the mean colours in CIELAB (D65), about 2 of which the eye just sees"


def mean_lab(picture: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Return the mean CIELAB colour, float64 ``(3,)``, of a region; NaN if it is empty.

    Args:
        picture: uint8 ``h w 3`` sRGB.
        region: bool ``h w``.
    """
    if not region.any():
        return np.full(3, np.nan)
    pixels = picture[region].astype(np.float32)[None] / 255.0
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)[0], np.float64).mean(axis=0)


def colour_shift(image: np.ndarray, edit: np.ndarray, region: np.ndarray) -> float:
    """Return the Euclidean distance of the mean CIELAB colours of ``region`` in two pictures."""
    if np.array_equal(image[region], edit[region]) and region.any():
        return 0.0
    return float(np.linalg.norm(mean_lab(edit, region) - mean_lab(image, region)))


def colour_measure(where: str) -> CaseMeasure:
    """Make the measure ``colour-inside`` or ``colour-outside`` (the mask)."""
    inside = where == "inside"

    def measure(batch: Batch) -> list[float]:
        pairs = zip(batch.cases, batch.edits, strict=True)
        return [colour_shift(case.image, edit, (case.mask > 127) == inside) for case, edit in pairs]

    card = ScoreCard(crop_rule=f"pixels {where} the mask", notes=NOTES)
    return CaseMeasure(f"colour-{where}", "clean", "lower", measure, card)
