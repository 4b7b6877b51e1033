"""Scores of pixels: the seam at the mask's border, colours, and PSNR, SSIM and LPIPS outside the mask."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from pbe.checkpoints.tower_weights import read_state
from pbe.errors import UserError
from pbe.evaluation.metrics.base import (
    Batch,
    CaseMeasure,
    Metric,
    NotRunError,
    Outcome,
    Score,
    ScoreCard,
    by_case,
)
from pbe.files import sha256_of

PEAK = 255.0
SIGMA, TAPS = 1.5, 11  # the window of Wang et al. 2004
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
OUTSIDE = "pixels outside the mask"
ALEXNET_SIDE = 31  # pixels; of anything smaller its second pooling leaves nothing
SEAM_FLOOR = 1.0  # squared grey levels; the rounding of bytes alone makes steps of that size
SEAM_CARD = ScoreCard(
    crop_rule="pairs of neighbouring pixels on either side of the mask's border",
    notes="geometric mean of the ratio of squared steps, edit to real image; 1 = no more seam than the "
    "real image has, below 1 = smoother than it",
)
COLOUR_NOTES = "distance of the mean colours in CIELAB (D65), about 2 of which the eye just sees"
SSIM_NOTES = (
    "Gaussian window of 11 pixels, sigma 1.5, on each of R, G and B; the masked region as in the real image"
)


def border_energy(image: np.ndarray, masked: np.ndarray) -> float:
    """Return the mean squared step across a mask's border, squared grey levels; NaN without a border.

    A step is the difference of two neighbouring pixels of the image (uint8 ``h w 3``), one of which is masked
    (bool ``h w``); the mean is over all such pairs, along rows and columns, and the channels.
    """
    total, count = 0.0, 0
    for pixels, inside in ((image, masked), (image.swapaxes(0, 1), masked.swapaxes(0, 1))):
        across = inside[:-1] != inside[1:]
        steps = pixels[1:][across].astype(np.int64) - pixels[:-1][across].astype(np.int64)
        total += float(np.sum(steps**2))
        count += steps.size
    return total / count if count else math.nan


def seam(image: np.ndarray, edit: np.ndarray, mask: np.ndarray) -> float:
    """Return the ratio of the border's energy in the edit to that in the real image, both at least one.

    It is 1 where the edit has the real image's step, more where its seam shows; NaN where the mask (uint8
    ``h w``, above 127 = repainted) has no border inside the image.
    """
    masked = mask > 127
    return (border_energy(edit, masked) + SEAM_FLOOR) / (border_energy(image, masked) + SEAM_FLOOR)


def seam_measure() -> CaseMeasure:
    """Make the measure ``seam``; its mean is geometric, since it is one of ratios."""
    logarithm = by_case(lambda image, edit, mask: math.log(seam(image, edit, mask)))
    return CaseMeasure(logarithm, SEAM_CARD, finish=math.exp, show=np.exp)


def mean_lab(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Return the mean CIELAB colour, float64 ``(3,)``, of a region (bool ``h w``); NaN if it is empty."""
    if not region.any():
        return np.full(3, np.nan)
    pixels = image[region].astype(np.float32)[None] / 255.0
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)[0], np.float64).mean(axis=0)


def colour_shift(image: np.ndarray, edit: np.ndarray, region: np.ndarray) -> float:
    """Return the Euclidean distance of the mean CIELAB colours of ``region`` in two images."""
    if np.array_equal(image[region], edit[region]) and region.any():
        return 0.0
    return float(np.linalg.norm(mean_lab(edit, region) - mean_lab(image, region)))


def colour_measure(where: str) -> CaseMeasure:
    """Make the measure of the colour shift ``inside`` or ``outside`` the mask."""
    shift = by_case(lambda image, edit, mask: colour_shift(image, edit, (mask > 127) == (where == "inside")))
    return CaseMeasure(shift, ScoreCard(crop_rule=f"pixels {where} the mask", notes=COLOUR_NOTES))


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


def psnr_measure() -> CaseMeasure:
    """Make ``psnr-outside``: the PSNR of the mean squared error over all cases, infinite for none."""
    notes = "dB of the mean squared error over all cases; exact = no pixel differs"
    card, measure = ScoreCard(crop_rule=OUTSIDE, notes=notes), by_case(squared_error_outside)
    return CaseMeasure(measure, card, finish=decibels, show=lambda values: np.array([*map(decibels, values)]))


def fill_masked(image: np.ndarray, edit: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the edit with the real image inside the mask, so that only what lies outside can differ."""
    return np.where((mask > 127)[..., None], image, edit)


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the structural similarity at every pixel and channel (Wang et al. 2004, eq. 13).

    Of two images, uint8 ``h w c``, float64 ``h w c`` up to 1, with a Gaussian window of 11 pixels, sigma 1.5,
    mirrored at the borders.
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

    Windows that reach into the masked region see the real image there in both, so that the painted content
    does not count.
    """
    kept = mask <= 127
    if not kept.any():
        return math.nan
    filled = fill_masked(image, edit, mask)
    if np.array_equal(filled, image):
        return 1.0
    return float(ssim_map(image, filled)[kept].mean())


def ssim_measure() -> CaseMeasure:
    """Make ``ssim-outside``."""
    return CaseMeasure(by_case(ssim_outside), ScoreCard(crop_rule=OUTSIDE, notes=SSIM_NOTES))


def load_lpips(weights: str | None, device: str = "cpu") -> nn.Module:
    """Build LPIPS on AlexNet (torchmetrics', which brings the learned weights of the layers).

    ``weights`` is torchvision's state dict of AlexNet on ImageNet, ``alexnet-owt-7be5be79.pth``; NotRunError
    where there is none, or no torchmetrics.
    """
    if weights is None:
        raise NotRunError("needs the weights of torchvision's AlexNet: --tower-weights lpips=FILE")
    try:
        from torchmetrics.functional.image.lpips import _LPIPS  # the network; its public wrapper downloads
    except ImportError as error:
        raise NotRunError("needs torchmetrics: pip install 'pbe[evaluation]'") from error
    network = _LPIPS(net="alex", pnet_rand=True)
    layers = {name.split(".", 1)[1]: value for name, value in network.net.named_parameters()}
    state = read_state(Path(weights))
    for name, value in layers.items():
        given = state.get(f"features.{name}")
        if given is None or given.shape != value.shape:
            raise UserError(f"'{weights}' holds no weights of torchvision's AlexNet: see 'features.{name}'")
        value.data.copy_(given)
    return network.to(device).eval()


def lpips_outside(network: nn.Module, image: np.ndarray, edit: np.ndarray, mask: np.ndarray) -> float:
    """Return LPIPS between the real image and the edit with the real image's content inside the mask.

    NaN where a side is below 31 pixels, of which AlexNet has no features.
    """
    if min(image.shape[:2]) < ALEXNET_SIDE:
        return math.nan
    filled = fill_masked(image, edit, mask)
    if np.array_equal(filled, image):
        return 0.0
    device = next(network.parameters()).device
    pixels = torch.from_numpy(np.stack([image, filled])).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1.0
    with torch.inference_mode():
        return float(network(pixels[:1], pixels[1:]).squeeze())


class LpipsMeasure(CaseMeasure):
    """``lpips-outside``; the card says how many images are too small for the network."""

    def __init__(self, weights: str | None, device: str = "cpu") -> None:
        network, self.small = load_lpips(weights, device), 0
        notes = "of the whole images, the masked region as in the real one"
        card = ScoreCard("LPIPS 0.1 on AlexNet", sha256_of(Path(weights or "")), "none", OUTSIDE, notes=notes)
        super().__init__(by_case(partial(lpips_outside, network)), card)

    def update(self, batch: Batch) -> None:
        """Measure a batch."""
        self.small += sum(min(case.image.shape[:2]) < ALEXNET_SIDE for case in batch.cases)
        super().update(batch)

    def finish(self, metric: Metric, outcome: Outcome) -> list[Score]:
        """Average over the cases that are large enough."""
        if self.small:
            outcome = outcome.with_excluded(f"smaller than {ALEXNET_SIDE} pixels", self.small)
        return super().finish(metric, outcome)
