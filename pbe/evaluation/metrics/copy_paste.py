"""Scores of copying: what an affine warp of the exemplar explains, and where its colours lie.

The copy-paste score is how much of the painted region an affine warp of the exemplar explains.

Both images are brought to 64 px and freed of their coarse shading (a Gaussian is taken off), so that
structure counts and smooth fills, which any smooth piece of the exemplar would explain, do not. The best
affine warp, mirrored or not, with a gain for each channel then explains a share of the region's energy,
up to 1. What the warped exemplar does not cover stays unexplained.

The number means little alone: a true object in a similar pose is explained in part as well. So the same
is measured for the real image's object, and the paired difference is the score to look at.

Coordinates are those of ``grid_sample`` without aligned corners: both images span [-1, 1] squared, whatever
their aspect, so that the identity is the exemplar stretched over the region. A warp is a matrix ``2 3`` that
takes a place of the region to the place of the exemplar that is shown there. The search starts from a fixed
grid of warps, and goes on from its best by Gauss-Newton steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pbe.data.samples.crops import resize_area
from pbe.evaluation.metrics.base import Batch, CaseMeasure, ScoreCard, by_case
from pbe.evaluation.metrics.towers import mask_bounds, region

SIZES = (16, 32, 64)  # the grid is searched on the first, and its best refined on the others
SHADING = 6 / 64  # sigma of what is taken off, a share of the side
FLOOR = (4.0 / 255.0) ** 2  # energy of a pixel and channel that counts as noise
CANDIDATES = 4  # warps that are refined
STEPS = 8  # on each size
AT_ONCE = 16  # cases whose warps are held together; bounds the memory at some 50 MB
NAMES = ("copy-paste", "copy-paste-true", "copy-paste-excess")

CARD = ScoreCard(
    resize_filter="area, both axes stretched to 64 px; exemplars likewise",
    crop_rule="bounding box of the mask, pixels of the mask only",
    notes="share of the region's band-passed energy that the best affine warp of the exemplar explains",
)
ROTATIONS = (-40.0, -20.0, 0.0, 20.0, 40.0)  # degrees
SCALES = (0.7, 0.9, 1.15, 1.5)  # of each axis; below 1 = the exemplar enlarged
SHIFTS = (-0.2, 0.0, 0.2)  # of each axis; 2 = the whole side
MIN_STRETCH, MAX_STRETCH = 0.45, 1.8  # singular values that a warp may have
MAX_SHIFT = 0.7
DAMPING = 0.02
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


def region_pyramid(image: np.ndarray, mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the region's structure and its mask at each of :data:`SIZES`, finest last.

    Of an image, uint8 ``h w 3``, and its mask, uint8 ``h w``, pairs of float32 ``s s 3`` and ``s s``.
    """
    x1, y1, x2, y2 = mask_bounds(mask)
    part, weight = image[y1:y2, x1:x2], (mask[y1:y2, x1:x2] > 127).astype(np.float32)
    weights = (resize_area(weight, size, size) for size in SIZES)
    return [(structure(part, size), w) for size, w in zip(SIZES, weights, strict=True)]


def structure(image: np.ndarray, size: int) -> np.ndarray:
    """Stretch an image, uint8 ``h w 3``, to a square and take its shading off; float32 ``s s 3``."""
    small = resize_area(image, size, size).astype(np.float32) / 255.0
    return small - cv2.GaussianBlur(small, (0, 0), SHADING * size, borderType=cv2.BORDER_REFLECT)


def explained_shares(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], exemplars: Sequence[np.ndarray]
) -> np.ndarray:
    """Return how much of each masked region its exemplar explains, float64 ``(n,)`` from 0 to 1.

    Args:
        images: uint8 ``h w 3`` each, or several of a case: ``v h w 3``, which returns ``(n, v)``.
        masks: uint8 ``h w`` each.
        exemplars: uint8 ``e f 3`` each.
    """
    parts = [slice(i, i + AT_ONCE) for i in range(0, len(images), AT_ONCE)]
    with torch.inference_mode():
        shares = [_shares(images[part], masks[part], exemplars[part]) for part in parts]
    result = np.concatenate(shares)
    return result[:, 0] if images[0].ndim == 3 else result


def _shares(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], exemplars: Sequence[np.ndarray]
) -> np.ndarray:
    versions = [one[None] if one.ndim == 3 else one for one in images]
    regions = [[region_pyramid(v, m) for v in one] for one, m in zip(versions, masks, strict=True)]
    views = len(versions[0])
    warps = _start(regions, exemplars)
    shares = torch.empty(0)
    for level, size in enumerate(SIZES[1:], start=1):
        shown = _stack([structure(one, size) for one in exemplars]).repeat_interleave(views, dim=0)
        target = _stack([view[level][0] for one in regions for view in one])
        weight = torch.from_numpy(np.stack([view[level][1] for one in regions for view in one]))
        shares, warps = refine(shown, target, weight, warps, FLOOR, STEPS)
    return shares.amax(dim=1).view(-1, views).double().numpy()


def _start(
    regions: list[list[list[tuple[np.ndarray, np.ndarray]]]], exemplars: Sequence[np.ndarray]
) -> Tensor:
    """Return the best warps of the grid for every view of every case, ``(n * v, candidates, 2, 3)``."""
    size, grid = SIZES[0], warp_grid()
    found = []
    for views, exemplar in zip(regions, exemplars, strict=True):
        shown = sample(_stack([structure(exemplar, size)]), grid[None], size)
        for view in views:
            target, weight = _stack([view[0][0]]), torch.from_numpy(view[0][1][None])
            share, _ = explained(target.flatten(2), shown, weight.flatten(1), FLOOR)
            order = torch.argsort(share[0], descending=True, stable=True)
            found.append(grid[order[:CANDIDATES]])
    return torch.stack(found)


def _stack(images: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def copy_paste_measure() -> CaseMeasure:
    """Make ``copy-paste`` of the edits, ``copy-paste-true`` of the true objects, and their difference."""

    def measure(batch: Batch) -> np.ndarray:
        pairs = [np.stack([e, c.image]) for e, c in zip(batch.edits, batch.cases, strict=True)]
        masks, exemplars = [c.mask for c in batch.cases], [c.exemplar for c in batch.cases]
        both = explained_shares(pairs, masks, exemplars)
        return np.column_stack([both, both[:, 0] - both[:, 1]])

    return CaseMeasure(measure, CARD)


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


def layout(image: np.ndarray) -> np.ndarray:
    """Return an image's colours on the grid less each channel's mean, float64 ``(8, 8, 3)``."""
    small = resize_area(image, GRID, GRID).astype(np.float64)
    return small - small.mean(axis=(0, 1))


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two layouts, -1 to 1; 0 where one of them is a single colour."""
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.sum(first * second)) / size if size else 0.0


def layout_copy(part: np.ndarray, exemplar: np.ndarray) -> float:
    """Return how much more a region's layout is the exemplar's than the mirrored exemplar's, -2 to 2.

    The copy-paste score asks how much of the region's detail some warp of the exemplar explains; a model that
    copies blurredly, or has learned little else yet, hardly moves it. Colours on a coarse grid do: the region
    of a model that copies agrees with its exemplar as it stands, and less with the mirrored one. A model that
    only knows *what* the exemplar shows has no reason to prefer either, and scores 0, the value to aim at;
    below it stands who copies the mirror image. Who ignores the exemplar scores 0 as well, so the score says
    nothing alone.
    """
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
