"""Affine warps of one small image onto another: a fixed grid of them, and Gauss-Newton from its best.

All coordinates are those of ``grid_sample`` without aligned corners: both images span [-1, 1] squared,
whatever their aspect, so that the identity is the exemplar stretched over the region. A warp is a matrix
``2 3`` that takes a place of the region to the place of the exemplar that is shown there.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

ROTATIONS = (-40.0, -20.0, 0.0, 20.0, 40.0)  # degrees
SCALES = (0.7, 0.9, 1.15, 1.5)  # of each axis; below 1 = the exemplar enlarged
SHIFTS = (-0.2, 0.0, 0.2)  # of each axis; 2 = the whole side
MIN_STRETCH, MAX_STRETCH = 0.45, 1.8  # singular values that a warp may have
MAX_SHIFT = 0.7
DAMPING = 0.02


def warp_grid(flips: bool = True) -> Tensor:
    """Return the warps that the search starts from, float32 ``(k, 2, 3)``."""
    warps = []
    for turn, x, y, flip in itertools.product(ROTATIONS, SCALES, SCALES, (1.0, -1.0) if flips else (1.0,)):
        cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        linear = [[flip * x * cosine, -flip * x * sine], [y * sine, y * cosine]]
        for shift in itertools.product(SHIFTS, SHIFTS):
            warps.append([[*row, at] for row, at in zip(linear, shift, strict=True)])
    return torch.tensor(warps)


def places(size: int) -> Tensor:
    """Return the pixel centres of a square image as ``(x, y, 1)``, float32 ``(size * size, 3)``."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], dim=-1).view(-1, 3)


def sample(images: Tensor, warps: Tensor, size: int) -> Tensor:
    """Show images ``(b, c, h, w)`` through ``k`` warps each, ``(b, k, 2, 3)``; return ``(b, k, c, size^2)``.

    What lies beyond an image is zero.
    """
    b, k = warps.shape[:2]
    grid = torch.einsum("bkij,nj->bkni", warps, places(size))
    shown = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return shown.view(b, -1, k, size * size).transpose(1, 2)


def explained(target: Tensor, shown: Tensor, weight: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return the share of a target's energy that warped images explain, a gain for each channel free.

    Args:
        target: ``(b, c, n)``.
        shown: ``(b, k, c, n)``.
        weight: ``(b, n)``, of every pixel.
        floor: energy of a pixel and channel that noise would have, added to the target's.

    Returns:
        Shares ``(b, k)`` from 0 to 1, and the gains ``(b, k, c)``, none below zero.
    """
    weighted = target * weight[:, None]
    cross = torch.einsum("bkcn,bcn->bkc", shown, weighted).clamp_min(0)
    own = torch.einsum("bkcn,bkcn,bn->bkc", shown, shown, weight)
    total = torch.einsum("bcn,bcn->b", target, weighted)
    noise = floor * weight.sum(-1)  # of a channel
    gains = cross / (own + noise[:, None, None])
    return (gains * cross).sum(-1) / (total + target.shape[1] * noise)[:, None], gains


def gradients(images: Tensor) -> Tensor:
    """Return images with their derivatives along x and y, ``(b, 3 c, h, w)``; a side is two long."""
    size = images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    along_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) * size / 4
    along_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) * size / 4
    return torch.cat([images, along_x, along_y], dim=1)


def refine(
    exemplar: Tensor, target: Tensor, weight: Tensor, warps: Tensor, floor: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Improve warps by damped Gauss-Newton steps on the squared error; keep the best of each.

    Exemplars and targets are ``(b, c, s, s)``, their weights ``(b, s, s)``, the warps to start from
    ``(b, k, 2, 3)``; ``floor`` is that of :func:`explained`. Returns the best shares ``(b, k)`` and warps.
    """
    size, channels = target.shape[-1], target.shape[1]
    images, goal, mask = gradients(exemplar), target.flatten(2), weight.flatten(1)
    best, best_warps = torch.full(warps.shape[:2], -1.0), warps
    for step in range(steps + 1):
        shown, along_x, along_y = sample(images, warps, size).split(channels, dim=2)
        share, gains = explained(goal, shown, mask, floor)
        better = (share > best) & allowed(warps)
        best = torch.where(better, share, best)
        best_warps = torch.where(better[..., None, None], warps, best_warps)
        if step < steps:
            slopes = torch.stack([along_x, along_y], dim=2) * gains[:, :, None, :, None]
            warps = warps + _newton_step(goal[:, None] - gains[..., None] * shown, slopes, mask, size)
    return best, best_warps


def allowed(warps: Tensor) -> Tensor:
    """Return which warps ``(..., 2, 3)`` neither shrink, enlarge nor move the exemplar too far."""
    linear, shift = warps[..., :2], warps[..., 2]
    square, det = linear.square().sum((-2, -1)), torch.linalg.det(linear).abs()
    spread = (square**2 - 4 * det**2).clamp_min(0).sqrt()
    largest, smallest = ((square + spread) / 2).sqrt(), ((square - spread) / 2).clamp_min(0).sqrt()
    near = shift.abs().amax(-1) <= MAX_SHIFT
    return (largest <= MAX_STRETCH) & (smallest >= MIN_STRETCH) & near


def _newton_step(error: Tensor, slopes: Tensor, weight: Tensor, size: int) -> Tensor:
    """Return the change of the warps, ``(b, k, 2, 3)``.

    ``error`` is ``(b, k, c, n)``, ``slopes`` are the derivatives of what is shown along x and y,
    ``(b, k, 2, c, n)``, and ``weight`` is ``(b, n)``.
    """
    basis = places(size)  # n 3
    pairs = (basis[:, :, None] * basis[:, None, :]).flatten(1)  # n 9
    energy = torch.einsum("bkicn,bkjcn->bkijn", slopes, slopes) * weight[:, None, None, None]
    normal = (energy @ pairs).unflatten(-1, (3, 3))  # b k 2 2 3 3
    normal = normal.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # b k 6 6
    pull = torch.einsum("bkicn,bkcn->bkin", slopes, error) * weight[:, None, None]
    right = (pull @ basis).flatten(2)  # b k 6
    diagonal = torch.diagonal(normal, dim1=-2, dim2=-1)
    damped = normal + torch.diag_embed(DAMPING * diagonal + 1e-6 + 1e-4 * diagonal.amax(-1, keepdim=True))
    return torch.linalg.solve(damped, right[..., None]).view(*right.shape[:2], 2, 3)
