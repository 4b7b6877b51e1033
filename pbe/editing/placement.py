"""Where the model works, on the whole image or around the masked region, and how edits are pasted back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from torch import Tensor
from torch.nn import functional as F

from pbe.editing.batch.jobs import LONGEST, MARGIN
from pbe.editing.images import composite, to_unit
from pbe.editing.inputs import Batch
from pbe.editing.output import to_pictures
from pbe.editing.preprocess import (
    Size,
    check_count,
    check_number,
    pad,
    reduce_mask,
    resize_picture,
    working_size,
)
from pbe.errors import EditTypeError, EditValueError

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


REGIONS = ("full", "mask")


@dataclass(frozen=True)
class Placement:
    """What a call asks for; the fields are those of ``PaintByExample.__call__``."""

    region: str
    height: int | None
    width: int | None
    margin: float
    feather: float | None
    preserve_background: bool

    def __post_init__(self) -> None:
        """Bring numbers of numpy, and sizes that are whole floats, to Python's int and float."""
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_count(name, getattr(self, name)))
        for name in ("margin", "feather"):
            if getattr(self, name) is not None or name == "margin":
                object.__setattr__(self, name, check_number(name, getattr(self, name)))
        if not isinstance(self.preserve_background, bool | np.bool_):
            kind = type(self.preserve_background).__name__
            raise EditTypeError(f"preserve_background: {kind}; it must be True or False")

    def check(self) -> None:
        """Refuse what has no meaning."""
        if self.region not in REGIONS:
            raise EditValueError(f"no region '{self.region}'; there are: {', '.join(REGIONS)}")
        for name, value in (("margin", self.margin), ("feather", self.feather)):
            if value is not None and not 0.0 <= value <= LONGEST:
                raise EditValueError(f"{name} is {value}; it must lie between 0 and {LONGEST}")
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and side > LONGEST:
                raise EditValueError(f"{name} is {side}; it must be at most {LONGEST}")

    def resized(self, batch: Batch) -> Batch:
        """Return the batch at the height and width asked for; of a region they are the model's sizes."""
        height, width = batch.holes[0].shape
        size = (self.height or height, self.width or width)
        if self.region == "mask" or size == (height, width):
            return batch
        pictures = [resize_picture(picture, size) for picture in batch.pictures]
        return replace(batch, pictures=pictures, holes=[reduce_mask(hole, size) for hole in batch.holes])

    def view(self, batch: Batch, image_size: int, largest_side: int) -> View:
        """Return what the model is shown of each picture.

        Args:
            batch: the pictures and their holes.
            image_size: the model's training resolution.
            largest_side: see :func:`pbe.editing.preprocess.working_size`.
        """
        if self.region == "full":
            picture_size = batch.holes[0].shape[:2]
            asked = self.height is not None or self.width is not None
            size = picture_size if asked else working_size(picture_size, image_size, largest_side)
            return View(batch.pictures, batch.holes, size, None)
        size = (self.height or image_size, self.width or image_size)
        boxes = [region_box(hole, size, self.margin) for hole in batch.holes]
        pictures = [box.cut(picture) for box, picture in zip(boxes, batch.pictures, strict=True)]
        holes = [box.cut(hole) for box, hole in zip(boxes, batch.holes, strict=True)]
        return View(pictures, holes, size, boxes)


@dataclass(frozen=True)
class View:
    """What the model is shown.

    Attributes:
        pictures: whole pictures or parts of them, ``h w 3``.
        holes: bool ``h w`` of the same sizes.
        size: height and width at which the model works, before padding.
        boxes: where the parts lie; None for whole pictures.
    """

    pictures: Sequence[np.ndarray]
    holes: Sequence[np.ndarray]
    size: Size
    boxes: Sequence[Box] | None


def put_back(painted: Tensor, index: int, batch: Batch, view: View, placement: Placement) -> np.ndarray:
    """Return an edit at its picture's size, float32 ``h w 3`` in [0, 1].

    Args:
        painted: what the model made, ``(3, h, w)`` about [-1, 1], at the working size.
        index: number of the picture in the batch.
        batch: the pictures.
        view: what the model was shown.
        placement: what was asked for.
    """
    picture, hole = batch.pictures[index], batch.holes[index]
    if view.boxes is None:
        edit = _fitted(painted, hole.shape[:2])
        return composite(picture, edit, hole) if placement.preserve_background else edit
    box = view.boxes[index]
    edit = _fitted(painted, (box.height, box.width))
    share = seam(hole, box, view.size, keep_outside=placement.preserve_background, feather=placement.feather)
    return paste(to_unit(picture), edit, box, share)


def _fitted(painted: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Resize ``(3, h, w)`` in [-1, 1] and return float32 ``h w 3`` clipped to [0, 1]."""
    if tuple(painted.shape[-2:]) != tuple(size):
        painted = F.interpolate(painted[None], tuple(size), mode="bicubic", antialias=True)[0]
    return to_pictures(painted[None])[0]
