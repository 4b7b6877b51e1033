"""What an edit changed outside its mask: PSNR, SSIM and LPIPS over the pixels that were to be kept."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from pbe.checkpoints.tower_weights import read_state
from pbe.errors import UserError
from pbe.evaluation.metrics.measures import Batch, CaseMeasure, NotRunError, Outcome
from pbe.evaluation.metrics.results import Score, ScoreCard
from pbe.files import sha256_of

PEAK = 255.0
SIGMA, TAPS = 1.5, 11  # the window of Wang et al. 2004
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
RULE = "pixels outside the mask"
ALEXNET_SIDE = 31  # pixels; of anything smaller its second pooling leaves nothing


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


def load_lpips(weights: str | None, device: str = "cpu") -> nn.Module:
    """Build LPIPS on AlexNet (torchmetrics', which brings the learned weights of the layers).

    Args:
        weights: torchvision's state dict of AlexNet on ImageNet, ``alexnet-owt-7be5be79.pth``.
        device: where it runs.

    Raises:
        NotRunError: no weights are given, or torchmetrics is not installed.
        UserError: the file is none of AlexNet's.
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
    """Return LPIPS between the real picture and the edit with the real picture's content in the hole.

    NaN where a side is below 31 pixels, of which AlexNet has no features.
    """
    if min(image.shape[:2]) < ALEXNET_SIDE:
        return math.nan
    filled = fill_hole(image, edit, mask)
    if np.array_equal(filled, image):
        return 0.0
    device = next(network.parameters()).device
    with torch.inference_mode():
        return float(network(_signed(image, device), _signed(filled, device)).squeeze())


def _signed(picture: np.ndarray, device: torch.device) -> Tensor:
    """Return a picture, uint8 ``h w 3``, in [-1, 1], float32 ``(1, 3, h, w)``."""
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
    return pixels.to(device).float() / 127.5 - 1.0


class LpipsMeasure(CaseMeasure):
    """A :class:`CaseMeasure` whose pictures may be too small for the network; the card then says so."""

    small = 0

    def update(self, batch: Batch) -> None:
        """Measure a batch."""
        self.small += sum(min(case.image.shape[:2]) < ALEXNET_SIDE for case in batch.cases)
        super().update(batch)

    def finish(self, outcome: Outcome) -> list[Score]:
        """Average over the cases that are large enough."""
        if self.small:
            outcome = outcome.with_excluded(f"smaller than {ALEXNET_SIDE} pixels", self.small)
        return super().finish(outcome)


def lpips_measure(weights: str | None, device: str = "cpu") -> CaseMeasure:
    """Make ``lpips-outside``; see :func:`load_lpips` for what is raised."""
    network = load_lpips(weights, device)

    def measure(batch: Batch) -> list[float]:
        pairs = zip(batch.cases, batch.edits, strict=True)
        return [lpips_outside(network, case.image, edit, case.mask) for case, edit in pairs]

    digest = sha256_of(Path(weights or ""))
    notes = "of the whole pictures, the hole as in the real one"
    card = ScoreCard("LPIPS 0.1 on AlexNet", digest, "none", RULE, notes=notes)
    return LpipsMeasure("lpips-outside", "clean", "lower", measure, card)
