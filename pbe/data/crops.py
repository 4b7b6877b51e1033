"""The square crop: it keeps the extended box inside and never squashes the picture.

Paint by Example crops a square of the short side around the object, then shrinks it symmetrically. Where no
such square exists the original squashes the whole picture; here the extended box is shrunk towards the box,
and where the box itself is too long the picture is padded to a square by reflection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from pbe.data.masks import Box


@dataclass(frozen=True)
class Crop:
    """A rectangle of whole pixels in the picture's coordinates; parts outside the picture are reflected.

    ``width`` and ``height`` are equal but for the original's squashed pictures.
    """

    x: int
    y: int
    width: int
    height: int

    def scales(self, size: int) -> tuple[float, float]:
        """Return the factors along x and y that bring the crop to ``size`` x ``size`` pixels."""
        return size / self.width, size / self.height

    def to_output(self, box: Box, size: int) -> Box:
        """Return a box of the picture in the pixels of the crop resized to ``size`` x ``size``."""
        sx, sy = self.scales(size)
        return Box(
            (box.x1 - self.x) * sx, (box.y1 - self.y) * sy, (box.x2 - self.x) * sx, (box.y2 - self.y) * sy
        )


@dataclass(frozen=True)
class CropPlan:
    """A crop, the extended box that fits into it, and the events: ``shrunk``, ``padded``, ``squashed``."""

    crop: Crop
    extended: Box
    events: tuple[str, ...] = ()


def _fit_length(
    low: float, high: float, inner_low: float, inner_high: float, limit: float
) -> tuple[float, float]:
    """Shrink the interval low..high to ``limit`` by moving both ends towards the inner interval.

    Each end gives up the same share of its distance, to whole pixels; the inner interval is not longer
    than ``limit``.
    """
    excess = (high - low) - limit
    if excess <= 0:
        return low, high
    slack_low, slack_high = inner_low - low, high - inner_high
    taken = min(max(round(excess * slack_low / (slack_low + slack_high)), excess - slack_high), slack_low)
    return low + taken, high - (excess - taken)


def _shrink_margin(crop: Crop, extended: Box, fraction: float, rng: np.random.Generator) -> Crop:
    """Move all four sides inwards by as many whole pixels, at most ``fraction`` of the least margin."""
    margin = min(
        extended.x1 - crop.x,
        extended.y1 - crop.y,
        crop.x + crop.width - extended.x2,
        crop.y + crop.height - extended.y2,
    )
    inset = int(rng.integers(0, max(int(fraction * margin), 0) + 1))
    return Crop(crop.x + inset, crop.y + inset, crop.width - 2 * inset, crop.height - 2 * inset)


def padded_square(width: int, height: int, side: int) -> Crop:
    """Return the square of ``side`` pixels around a picture's middle; it may reach beyond the picture."""
    return Crop((width - side) // 2, (height - side) // 2, side, side)


def _offset_range(low: float, high: float, length: int, side: int) -> tuple[int, int]:
    """Return the first and last start of a window of ``side`` that holds low..high inside 0..length."""
    return max(0, int(high) - side), min(length - side, int(low))


def plan_square_crop(
    box: Box, extended: Box, width: int, height: int, shrink_fraction: float, rng: np.random.Generator
) -> CropPlan:
    """Choose a square crop that contains the extended box.

    Args:
        box: the object, inside the picture, of whole pixels.
        extended: contains the box, of whole pixels.
        width: of the picture, pixels.
        height: of the picture, pixels.
        shrink_fraction: share of the least margin by which the square may shrink on all sides.
        rng: generator that is advanced.

    Returns:
        The crop; the extended box, smaller where it was longer than the short side (event ``shrunk``);
        or a crop that reaches beyond the picture where the box itself was longer (event ``padded``).
    """
    side = min(width, height)
    if max(box.width, box.height) > side:
        crop = padded_square(width, height, max(width, height))
        return CropPlan(_shrink_margin(crop, extended, shrink_fraction, rng), extended, ("padded",))
    x1, x2 = _fit_length(extended.x1, extended.x2, box.x1, box.x2, side)
    y1, y2 = _fit_length(extended.y1, extended.y2, box.y1, box.y2, side)
    fitted = Box(x1, y1, x2, y2)
    low_x, high_x = _offset_range(x1, x2, width, side)
    low_y, high_y = _offset_range(y1, y2, height, side)
    crop = Crop(int(rng.integers(low_x, high_x + 1)), int(rng.integers(low_y, high_y + 1)), side, side)
    events = ("shrunk",) if fitted != extended else ()
    return CropPlan(_shrink_margin(crop, fitted, shrink_fraction, rng), fitted, events)


def plan_original_crop(
    extended: Box, width: int, height: int, shrink_fraction: float, rng: np.random.Generator
) -> CropPlan:
    """Choose a crop as the original code does: where fewer than two positions exist, squash the picture.

    Square pictures are neither cropped nor shrunk. The event ``squashed`` marks a changed aspect ratio.
    """
    side = min(width, height)
    low, high = (
        _offset_range(extended.x1, extended.x2, width, side)
        if width > height
        else _offset_range(extended.y1, extended.y2, height, side)
    )
    start = int(rng.integers(low, high + 1)) if low < high else 0
    if width == height or low >= high:
        return CropPlan(Crop(0, 0, width, height), extended, () if width == height else ("squashed",))
    crop = Crop(start, 0, side, side) if width > height else Crop(0, start, side, side)
    return CropPlan(_shrink_margin(crop, extended, shrink_fraction, rng), extended)


def resize(picture: np.ndarray, width: int, height: int, antialias_above: float = 1.0) -> np.ndarray:
    """Resize a uint8 picture ``h w c`` or ``h w``, in uint8.

    Args:
        picture: what to resize.
        width: of the result, pixels.
        height: of the result, pixels.
        antialias_above: a side that shrinks by more than this factor makes OpenCV average areas
            (``INTER_AREA``, antialiased); below it OpenCV interpolates bilinearly (``INTER_LINEAR``).
    """
    factor = max(picture.shape[1] / width, picture.shape[0] / height)
    interpolation = cv2.INTER_AREA if factor > antialias_above else cv2.INTER_LINEAR
    return cv2.resize(picture, (width, height), interpolation=interpolation)


def cut(picture: np.ndarray, crop: Crop, size: int, antialias_above: float = 1.0) -> np.ndarray:
    """Cut a crop out of a picture (uint8 ``h w 3``), reflecting what lies outside, at ``size`` x ``size``.

    It is cropped first and then resized; ``antialias_above`` as in :func:`resize`.
    """
    height, width = picture.shape[:2]
    left, top = max(-crop.x, 0), max(-crop.y, 0)
    right, bottom = max(crop.x + crop.width - width, 0), max(crop.y + crop.height - height, 0)
    if left or top or right or bottom:
        picture = cv2.copyMakeBorder(picture, top, bottom, left, right, cv2.BORDER_REFLECT_101)
    x, y = crop.x + left, crop.y + top
    return resize(picture[y : y + crop.height, x : x + crop.width], size, size, antialias_above)


def _pixels_inside(low: float, high: float, size: int) -> slice:
    """Return the pixels of 0..size that lie wholly in low..high; where none does, the one at its middle."""
    low, high = max(low, 0.0), min(high, float(size))
    first, last = math.ceil(low - 1e-6), math.floor(high + 1e-6)
    if first >= last:
        first = min(int((low + high) / 2), size - 1)
        last = first + 1
    return slice(first, last)


def valid_mask(crop: Crop, width: int, height: int, size: int) -> np.ndarray:
    """Return uint8 ``size size``: 255 where a pixel of the resized crop lies inside the picture, else 0.

    A picture that became too thin to hold a whole pixel has the row or column along its middle.
    """
    inside = crop.to_output(Box(0.0, 0.0, float(width), float(height)), size)
    mask = np.zeros((size, size), np.uint8)
    mask[_pixels_inside(inside.y1, inside.y2, size), _pixels_inside(inside.x1, inside.x2, size)] = 255
    return mask
