"""Where the model works, on the whole image or around the masked region, and how edits are pasted back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from torch import Tensor
from torch.nn import functional as F

from pbe.editing.images import composite, to_unit
from pbe.editing.inputs import Batch
from pbe.editing.output import to_images
from pbe.editing.preprocess import Size, pad, reduce_mask, resize_image, working_size
from pbe.editing.settings import EditSettings

LEAST_SHARE = 0.25  # the margin may shrink to this share of itself before a region leaves the image
MOST_ENLARGED = 4.0  # a tiny mask is not shown to the model larger than this
FEATHER = 4.0  # width of the seam, in pixels of the model
FEATHER_SHARE = 0.25  # and at most this share of the way from the mask's border to its middle


@dataclass(frozen=True)
class Box:
    """A part of an image in pixels; it may reach beyond the image, where that is smaller."""

    top: int
    left: int
    height: int
    width: int

    def inside(self, size: Size) -> tuple[slice, slice]:
        """Return the rows and columns of an image of that size which the box covers."""
        rows = slice(max(self.top, 0), min(self.top + self.height, size[0]))
        return rows, slice(max(self.left, 0), min(self.left + self.width, size[1]))

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Return the box's part of ``h w ...``, reflected or repeated beyond the border."""
        rows, columns = self.inside(array.shape[:2])
        vertical = (rows.start - self.top, self.top + self.height - rows.stop)
        horizontal = (columns.start - self.left, self.left + self.width - columns.stop)
        return pad(array[rows, columns], (vertical, horizontal))

    def trim(self, array: np.ndarray, size: Size) -> np.ndarray:
        """Cut off what lies beyond an image of that size from ``h w ...`` of the box's size."""
        rows, columns = self.inside(size)
        return array[
            rows.start - self.top : rows.stop - self.top, columns.start - self.left : columns.stop - self.left
        ]


def region_box(mask: np.ndarray, target: Size, margin: float = EditSettings.margin) -> Box:
    """Return the part of the image to edit: of the target's aspect, around the masked region, bool ``h w``.

    It is the region's bounding box with the margin (a share of its longer side) on each side, inside the
    image if it can be: the margin shrinks before the box leaves the image, though not to nothing. A very
    small region gets more surroundings. ``target`` is the height and width that the part is edited at.
    """
    (top, bottom), (left, right) = (_extent(np.any(mask, axis=axis)) for axis in (1, 0))
    height, width = bottom - top, right - left

    def scale(share: float) -> float:
        """Return the image's pixels per target pixel of a box with this share of the margin."""
        room = 2.0 * margin * share * max(height, width)
        return max((height + room) / target[0], (width + room) / target[1])

    within = min(side / aim for side, aim in zip(mask.shape, target, strict=True))
    covering = max(side / aim for side, aim in zip(mask.shape, target, strict=True))
    wanted = min(max(scale(1.0), 1.0 / MOST_ENLARGED), covering)
    chosen = max(min(wanted, within), min(scale(LEAST_SHARE), wanted))
    size = [max(math.ceil(aim * chosen - 1e-6), 1) for aim in target]
    middle = ((top + bottom) / 2, (left + right) / 2)
    start = [_place(m, length, side) for m, length, side in zip(middle, size, mask.shape, strict=True)]
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
    mask: np.ndarray, box: Box, target: Size, *, keep_outside: bool, feather: float | None = None
) -> np.ndarray:
    """Return how much of the edit each pixel of the box takes, float32 in [0, 1], inside the image.

    With ``keep_outside`` nothing outside the mask (bool ``h w``) is touched, and the seam runs inside it;
    otherwise the whole box is taken, and the seam runs along its border. ``target`` is the height and width
    that it was edited at, ``feather`` the width of the seam in pixels of the image; None takes half a latent
    cell of the model, but no more than a quarter of the way to the middle of the masked region.
    """
    rows, columns = box.inside(mask.shape)
    scale = max(box.height / target[0], box.width / target[1])
    inner = _ramp(mask[rows, columns].astype(np.uint8), scale, feather)
    if keep_outside:
        return inner
    # a row or column of zeros stands for what follows the box, except where the image ends
    ends = [(rows.start > 0, rows.stop < mask.shape[0]), (columns.start > 0, columns.stop < mask.shape[1])]
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


def paste(image: np.ndarray, edit: np.ndarray, box: Box, share: np.ndarray) -> np.ndarray:
    """Blend an edited part into its image (float32 ``h w 3``), and return a new one.

    ``share`` of the edit is float32 ``h w`` of the part of the box inside the image; where it is 0 the result
    has the image's very numbers.
    """
    result, part = image.copy(), box.inside(image.shape[:2])
    weight = share[:, :, None]
    blended = image[part] + weight * (box.trim(edit, image.shape[:2]) - image[part])
    result[part] = np.where(weight > 0.0, blended, image[part])
    return result


@dataclass(frozen=True)
class View:
    """What the model is shown.

    Attributes:
        images: whole images or parts of them, ``h w 3``.
        masks: bool ``h w`` of the same sizes.
        size: height and width at which the model works, before padding.
        boxes: where the parts lie; None for whole images.
    """

    images: Sequence[np.ndarray]
    masks: Sequence[np.ndarray]
    size: Size
    boxes: Sequence[Box] | None


def resize_batch(batch: Batch, settings: EditSettings) -> Batch:
    """Return the batch at the height and width asked for; of a region they are the model's sizes."""
    height, width = batch.masks[0].shape
    size = (settings.height or height, settings.width or width)
    if settings.region == "mask" or size == (height, width):
        return batch
    images = [resize_image(image, size) for image in batch.images]
    return replace(batch, images=images, masks=[reduce_mask(mask, size) for mask in batch.masks])


def choose_view(batch: Batch, settings: EditSettings, image_size: int, largest_side: int) -> View:
    """Return what a model of this training resolution is shown of each image; see ``working_size``."""
    if settings.region == "full":
        whole = batch.masks[0].shape[:2]
        asked = settings.height is not None or settings.width is not None
        size = whole if asked else working_size(whole, image_size, largest_side)
        return View(batch.images, batch.masks, size, None)
    size = (settings.height or image_size, settings.width or image_size)
    boxes = [region_box(mask, size, settings.margin) for mask in batch.masks]
    images = [box.cut(image) for box, image in zip(boxes, batch.images, strict=True)]
    masks = [box.cut(mask) for box, mask in zip(boxes, batch.masks, strict=True)]
    return View(images, masks, size, boxes)


def place_back(painted: Tensor, index: int, batch: Batch, view: View, settings: EditSettings) -> np.ndarray:
    """Return an edit at its image's size, float32 ``h w 3`` in [0, 1].

    ``painted`` is what the model made of image ``index``, ``(3, h, w)`` about [-1, 1], at the working size.
    """
    image, mask, keep_outside = batch.images[index], batch.masks[index], settings.preserve_background
    if view.boxes is None:
        edit = _fitted(painted, mask.shape[:2])
        return composite(image, edit, mask) if keep_outside else edit
    box = view.boxes[index]
    edit = _fitted(painted, (box.height, box.width))
    share = seam(mask, box, view.size, keep_outside=keep_outside, feather=settings.feather)
    return paste(to_unit(image), edit, box, share)


def _fitted(painted: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Resize ``(3, h, w)`` in [-1, 1] and return float32 ``h w 3`` clipped to [0, 1]."""
    if tuple(painted.shape[-2:]) != tuple(size):
        painted = F.interpolate(painted[None], tuple(size), mode="bicubic", antialias=True)[0]
    return to_images(painted[None])[0]
