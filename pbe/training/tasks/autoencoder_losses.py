"""What the autoencoder is trained on, pixel by pixel: absolute and squared error, and that of edges."""

from __future__ import annotations

import torch
from torch import Tensor


def reconstruction_terms(decoded: Tensor, pictures: Tensor) -> dict[str, Tensor]:
    """Return mean absolute (``l1``) and squared error (``l2``) of pixels, and ``gradient`` of differences.

    Both arguments are ``(b, 3, h, w)`` in [-1, 1]. ``gradient`` is the mean absolute error of finite
    differences, which makes blurred edges costly without a perceptual network; ``l2`` keeps rare
    saturated colours, which ``l1`` alone learns last.
    """
    error = decoded - pictures
    horizontal = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    vertical = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return {"l1": error.abs().mean(), "l2": (error**2).mean(), "gradient": horizontal + vertical}


def weighted_terms(decoded: Tensor, pictures: Tensor, hole: Tensor, hole_weight: float) -> dict[str, Tensor]:
    """Return the terms of :func:`reconstruction_terms` with other weights inside the hole than outside.

    Weights are made to have mean one over each picture, so that a batch and its micro-batches agree.

    Args:
        decoded: ``(b, 3, h, w)`` in [-1, 1].
        pictures: the same shape and range.
        hole: ``(b, 1, h, w)`` in [0, 1], 1 = repaint.
        hole_weight: of a pixel in the hole, where one outside counts 1.
    """
    weight, error = 1.0 + (hole_weight - 1.0) * hole, decoded - pictures
    horizontal = _weighted_mean(
        (error[..., :, 1:] - error[..., :, :-1]).abs(), torch.maximum(weight[..., 1:], weight[..., :-1])
    )
    vertical = _weighted_mean(
        (error[..., 1:, :] - error[..., :-1, :]).abs(), torch.maximum(weight[..., 1:, :], weight[..., :-1, :])
    )
    return {
        "l1": _weighted_mean(error.abs(), weight),
        "l2": _weighted_mean(error**2, weight),
        "gradient": horizontal + vertical,
    }


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Return the mean over pictures of the weighted means over each picture's ``(c, h, w)``."""
    sums = (values.mean(dim=1, keepdim=True) * weight).sum(dim=(1, 2, 3))
    return (sums / weight.sum(dim=(1, 2, 3))).mean()


def psnr(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Return the mean peak signal-to-noise ratio in dB of pictures ``(b, 3, h, w)`` in [-1, 1]."""
    error = ((decoded.clamp(-1, 1) - pictures) / 2.0) ** 2
    return (-10.0 * torch.log10(error.mean(dim=(1, 2, 3)).clamp_min(1e-10))).mean()
