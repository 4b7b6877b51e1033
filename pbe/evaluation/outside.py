"""What an edit changed outside its mask: PSNR, SSIM and LPIPS over the pixels that were to be kept."""

from __future__ import annotations

import math

import cv2
import numpy as np

from pbe.evaluation.measures import Batch, CaseMeasure
from pbe.evaluation.results import ScoreCard

PEAK = 255.0
SIGMA, TAPS = 1.5, 11  # the window of Wang et al. 2004
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
RULE = "pixels outside the mask"


def squared_error_outside(image: np.ndarray, edit: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean squared error outside the mask, squared grey levels; NaN if nothing lies outside."""
    kept = mask <= 127
    if not kept.any():
        return math.nan
    difference = edit[kept].astype(np.int64) - image[kept].astype(np.int64)
    return float(np.mean(difference**2))


def decibels(squared_error: float) -> float:
    """Return the peak signal-to-noise ratio of a mean squared error, dB; infinite for none."""
    return math.inf if squared_error == 0.0 else 10.0 * math.log10(PEAK**2 / squared_error)


def fill_hole(image: np.ndarray, edit: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the edit with the hole as in the real picture, so that only what lies outside can differ."""
    return np.where((mask > 127)[..., None], image, edit)


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the structural similarity at every pixel and channel (Wang et al. 2004, eq. 13).

    Args:
        a: uint8 ``h w c``.
        b: uint8 ``h w c``.

    Returns:
        Float64 ``h w c`` up to 1, with a Gaussian window of 11 pixels, sigma 1.5, mirrored at the borders.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _window(x), _window(y)
    var_x, var_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return likeness / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))


def _window(x: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.GaussianBlur(x, (TAPS, TAPS), SIGMA, borderType=cv2.BORDER_REFLECT))


def ssim_outside(image: np.ndarray, edit: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean structural similarity over the pixels outside the mask; NaN if there are none.

    Windows that reach into the hole see the real picture there in both, so that the painted content
    does not count.
    """
    kept = mask <= 127
    if not kept.any():
        return math.nan
    filled = fill_hole(image, edit, mask)
    if np.array_equal(filled, image):
        return 1.0
    return float(ssim_map(image, filled)[kept].mean())


def psnr_measure() -> CaseMeasure:
    """Make ``psnr-outside``: the PSNR of the mean squared error over all cases, infinite for none."""

    def measure(batch: Batch) -> list[float]:
        pairs = zip(batch.cases, batch.edits, strict=True)
        return [squared_error_outside(case.image, edit, case.mask) for case, edit in pairs]

    def show(values: np.ndarray) -> np.ndarray:
        return np.array([decibels(value) for value in values])

    card = ScoreCard(
        crop_rule=RULE, notes="dB of the mean squared error over all cases; exact = no pixel differs"
    )
    return CaseMeasure("psnr-outside", "clean", "higher", measure, card, finish=decibels, show=show)


def ssim_measure() -> CaseMeasure:
    """Make ``ssim-outside``."""

    def measure(batch: Batch) -> list[float]:
        pairs = zip(batch.cases, batch.edits, strict=True)
        return [ssim_outside(case.image, edit, case.mask) for case, edit in pairs]

    notes = "Gaussian window of 11 pixels, sigma 1.5, on each of R, G and B; the hole as in the real picture"
    return CaseMeasure("ssim-outside", "clean", "higher", measure, ScoreCard(crop_rule=RULE, notes=notes))
