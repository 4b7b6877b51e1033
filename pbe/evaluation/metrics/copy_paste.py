"""Copy-paste score: how much of the painted region an affine warp of the exemplar explains.

Both images are brought to 64 px and freed of their coarse shading (a Gaussian is taken off), so that
structure counts and smooth fills, which any smooth piece of the exemplar would explain, do not. The best
affine warp, mirrored or not, with a gain for each channel then explains a share of the region's energy,
up to 1. What the warped exemplar does not cover stays unexplained.

The number means little alone: a true object in a similar pose is explained in part as well. So the same
is measured for the real image's object, and the paired difference is the score to look at.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from pbe.data.samples.crops import resize_area
from pbe.evaluation.metrics.base import Batch, CaseMeasure, ScoreCard
from pbe.evaluation.metrics.features import mask_bounds
from pbe.evaluation.metrics.warps import explained, refine, sample, warp_grid

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
