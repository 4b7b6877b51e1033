"""The object's own mask as the sample's mask: read from the shard, cut like the image, dilated.

A mask lies in the JSON of its image as a run-length code of the whole image, upright as the image is
shown; ``pbe prepare`` puts it there for sources that have masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from pbe.data.samples.crops import Crop, resize_area, window
from pbe.data.samples.decode import BAD_ANNOTATION, BAD_INDEX, UNREADABLE, UnusableImageError
from pbe.data.samples.masks import Box
from pbe.data.samples.rle import decode_rle
from pbe.data.shards.archive import ShardImages
from pbe.data.shards.format import DamagedIndexError

ObjectMask = Callable[[], np.ndarray | None]


def _entry(annotation: dict[str, Any], box: Box, width: int, height: int) -> dict[str, Any]:
    """Return what the JSON says of a box that was clipped to the image; the first of several equal ones."""
    for entry in annotation["boxes"]:
        if Box(*(float(value) for value in entry["xyxy"])).clipped(width, height) == box:
            return dict(entry)
    raise ValueError("the annotation does not hold the box")


def read_object_mask(
    images: ShardImages, position: int, box: Box, frame: tuple[int, int], size: tuple[int, int]
) -> np.ndarray | None:
    """Return the mask of the object in a box, uint8 ``h w`` of 0 and 1; None where the shard holds none.

    A mask of which nothing lies in the box counts as none. Only a piece of the shard is read.

    Args:
        images: the shards.
        position: of the image.
        box: one of its boxes, as the annotation has it but clipped to the frame.
        frame: width and height that the annotation is for.
        size: of the mask that is wanted, no larger: the image may have been decoded at a smaller size.

    Raises:
        UnusableImageError: the annotation cannot be read, or its mask belongs to another image.
    """
    width, height = frame
    try:
        code = _entry(images.annotation(position), box, width, height).get("mask")
        mask = None if code is None else decode_rle(code)
    except DamagedIndexError as error:
        raise UnusableImageError(BAD_INDEX) from error
    except OSError as error:
        raise UnusableImageError(UNREADABLE) from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UnusableImageError(BAD_ANNOTATION) from error
    if mask is None:
        return None
    if mask.shape != (height, width):
        raise UnusableImageError(BAD_ANNOTATION)
    inner = box.rounded_out(width, height)
    if not mask[int(inner.y1) : int(inner.y2), int(inner.x1) : int(inner.x2)].any():
        return None
    return mask if size == frame else (shrink(mask, size) > 0).astype(np.uint8)


def shrink(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the share of each pixel that is not zero, float32, by area; ``size`` is width and height."""
    return resize_area((mask != 0).astype(np.float32), *size)


def cut_mask(mask: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """Return the share of each pixel that the object covers, float32 ``size size``, 0 to 1.

    Cropped, padded and resized as the image is, by area: where the padding is the image's reflection, the
    object is reflected with it.

    Args:
        mask: of the whole image, uint8 ``h w``, not zero on the object.
        crop: of the image.
        size: sides of the result, pixels.
    """
    return shrink(window(mask, crop, fill=0), (size, size))


def dilated_mask(cover: np.ndarray, radius: tuple[float, float]) -> np.ndarray:
    """Return the mask, uint8 ``s s``: 255 on every pixel that the object touches and around it.

    Args:
        cover: of :func:`cut_mask`.
        radius: the object is dilated by an ellipse of these half axes, pixels along x and y.
    """
    mask = np.where(cover > 0, np.uint8(255), np.uint8(0))
    across, down = (round(value) for value in radius)
    if across or down:
        shape = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * across + 1, 2 * down + 1))
        mask = cv2.dilate(mask, shape)
    return mask


def object_cover(cover: np.ndarray, mask: np.ndarray) -> float:
    """Return the share of the object, of :func:`cut_mask`, that a mask covers, 0 to 1."""
    lost, total = float(cover[mask == 0].sum()), float(cover.sum())
    return 1.0 - lost / total if total else 1.0
