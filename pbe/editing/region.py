"""Editing only the surroundings of the hole: which part of the picture, and its way back with a soft seam."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from pbe.editing.batch.jobs import MARGIN
from pbe.editing.preprocess import Size, pad

LEAST_SHARE = 0.25  # the margin may shrink to this share of itself before a region leaves the picture
MOST_ENLARGED = 4.0  # a tiny hole is not shown to the model larger than this
FEATHER = 4.0  # width of the seam, in pixels of the model
FEATHER_SHARE = 0.25  # and at most this share of the way from the hole's border to its middle


@dataclass(frozen=True)
class Box:
    """A part of a picture in pixels; it may reach beyond the picture, where that is smaller.

    Attributes:
        top: first row.
        left: first column.
        height: number of rows.
        width: number of columns.
    """

    top: int
    left: int
    height: int
    width: int

    def inside(self, size: Size) -> tuple[slice, slice]:
        """Return the rows and columns of a picture of that size which the box covers."""
        rows = slice(max(self.top, 0), min(self.top + self.height, size[0]))
        return rows, slice(max(self.left, 0), min(self.left + self.width, size[1]))

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Return the box's part of ``h w ...``, reflected or repeated beyond the border."""
        rows, columns = self.inside(array.shape[:2])
        vertical = (rows.start - self.top, self.top + self.height - rows.stop)
        horizontal = (columns.start - self.left, self.left + self.width - columns.stop)
        return pad(array[rows, columns], (vertical, horizontal))

    def trim(self, array: np.ndarray, size: Size) -> np.ndarray:
        """Cut off what lies beyond a picture of that size from ``h w ...`` of the box's size."""
        rows, columns = self.inside(size)
        return array[
            rows.start - self.top : rows.stop - self.top, columns.start - self.left : columns.stop - self.left
        ]


def region_box(hole: np.ndarray, target: Size, margin: float = MARGIN) -> Box:
    """Return the part of the picture to edit: of the target's aspect, around the hole.

    It is the hole's bounding box with the margin, inside the picture if it can be: the margin shrinks before
    the box leaves the picture, though not to nothing. A very small hole gets more surroundings.

    Args:
        hole: bool ``h w``.
        target: height and width that the part is edited at.
        margin: room on each side, as a share of the longer side of the hole's bounding box.
    """
    (top, bottom), (left, right) = (_extent(np.any(hole, axis=axis)) for axis in (1, 0))
    height, width = bottom - top, right - left

    def scale(share: float) -> float:
        """Return the picture's pixels per target pixel of a box with this share of the margin."""
        room = 2.0 * margin * share * max(height, width)
        return max((height + room) / target[0], (width + room) / target[1])

    within = min(side / aim for side, aim in zip(hole.shape, target, strict=True))
    covering = max(side / aim for side, aim in zip(hole.shape, target, strict=True))
    wanted = min(max(scale(1.0), 1.0 / MOST_ENLARGED), covering)
    chosen = max(min(wanted, within), min(scale(LEAST_SHARE), wanted))
    size = [max(math.ceil(aim * chosen - 1e-6), 1) for aim in target]
    middle = ((top + bottom) / 2, (left + right) / 2)
    start = [_place(m, length, side) for m, length, side in zip(middle, size, hole.shape, strict=True)]
    return Box(start[0], start[1], size[0], size[1])


def _extent(occupied: np.ndarray) -> tuple[int, int]:
    found = np.flatnonzero(occupied)
    return int(found[0]), int(found[-1]) + 1


def _place(middle: float, length: int, side: int) -> int:
    """Return where a stretch of that length begins: about the middle, inside the side if it fits."""
    if length >= side:
        return (side - length) // 2
    return min(max(round(middle - length / 2), 0), side - length)


def seam(
    hole: np.ndarray, box: Box, target: Size, *, keep_outside: bool, feather: float | None = None
) -> np.ndarray:
    """Return how much of the edit each pixel of the box takes, float32 in [0, 1], inside the picture.

    Args:
        hole: bool ``h w`` of the picture.
        box: the edited part.
        target: height and width that it was edited at.
        keep_outside: nothing outside the hole is touched, and the seam runs inside it; otherwise the whole
            box is taken, and the seam runs along the box's border.
        feather: width of the seam in pixels of the picture; None takes half a latent cell of the model, but
            no more than a quarter of the way to the hole's middle.
    """
    rows, columns = box.inside(hole.shape)
    scale = max(box.height / target[0], box.width / target[1])
    inner = _ramp(hole[rows, columns].astype(np.uint8), scale, feather)
    if keep_outside:
        return inner
    # a row or column of zeros stands for what follows the box, except where the picture ends
    ends = [(rows.start > 0, rows.stop < hole.shape[0]), (columns.start > 0, columns.stop < hole.shape[1])]
    framed = np.ones(inner.shape, np.uint8)
    framed = np.pad(framed, [(int(before), int(after)) for before, after in ends])
    outer = _ramp(framed, scale, feather)
    top, left = int(ends[0][0]), int(ends[1][0])
    return np.maximum(inner, outer[top : top + inner.shape[0], left : left + inner.shape[1]])


def _ramp(inside: np.ndarray, scale: float, feather: float | None) -> np.ndarray:
    """Rise from the border of what is inside (uint8 ``h w``, 0 or 1) to 1 over the width of the seam."""
    if inside.all():
        return inside.astype(np.float32)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    width = (
        min(FEATHER * scale, FEATHER_SHARE * (float(distance.max()) - 1.0)) if feather is None else feather
    )
    return np.clip(distance / np.float32(width + 1.0), 0.0, 1.0).astype(np.float32)


def paste(picture: np.ndarray, edit: np.ndarray, box: Box, share: np.ndarray) -> np.ndarray:
    """Blend an edited part into its picture.

    Args:
        picture: float32 ``h w 3``.
        edit: float32, of the box's size.
        box: where it goes.
        share: of the edit, float32 ``h w`` of the part of the box inside the picture.

    Returns:
        A new picture; where the share is 0 it has the very numbers of the old one.
    """
    result, part = picture.copy(), box.inside(picture.shape[:2])
    weight = share[:, :, None]
    blended = picture[part] + weight * (box.trim(edit, picture.shape[:2]) - picture[part])
    result[part] = np.where(weight > 0.0, blended, picture[part])
    return result
