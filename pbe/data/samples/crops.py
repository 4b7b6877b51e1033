"""Boxes and the square crop: it keeps the extended box inside and never squashes the image.

Paint by Example crops a square of the short side around the object, then shrinks it symmetrically. If there
is no such square, the original squashes the whole image. Here the extended box is shrunk towards the box, and
if the box itself is too long, the image is padded to a square by reflection. A mask is reflected with its
image (:func:`mirror_mask`), or the padding would show what the mask hides.

All coordinates are pixels as continuous numbers: pixel i covers the interval from i to i + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

GREY = 127  # of padding that is not a reflection; the network reads it as 0
ROUNDING = 1e-6  # pixels


@dataclass(frozen=True)
class Box:
    """An upright rectangle in pixels; x2 and y2 are exclusive."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def width(self) -> float:
        """Pixels."""
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        """Pixels."""
        return self.y2 - self.y1

    @property
    def area(self) -> float:
        """Square pixels; zero for an empty or inverted box."""
        return max(self.width, 0.0) * max(self.height, 0.0)

    def clipped(self, width: float, height: float) -> Box:
        """Return the part inside an image of ``width`` x ``height``; it may be empty or inverted."""
        return Box(max(self.x1, 0.0), max(self.y1, 0.0), min(self.x2, width), min(self.y2, height))

    def rounded_out(self, width: int, height: int) -> Box:
        """Return the smallest box of whole pixels around this one, clipped to ``width`` x ``height``."""
        # A small tolerance keeps 12.000000001 from taking a thirteenth pixel.
        low = (math.floor(self.x1 + 1e-6), math.floor(self.y1 + 1e-6))
        high = (math.ceil(self.x2 - 1e-6), math.ceil(self.y2 - 1e-6))
        whole = (max(low[0], 0), max(low[1], 0), min(high[0], width), min(high[1], height))
        return Box(*map(float, whole))

    def pixels(self) -> tuple[slice, slice]:
        """Return the rows and columns of a box of whole pixels, to index an array with."""
        return slice(int(self.y1), int(self.y2)), slice(int(self.x1), int(self.x2))


@dataclass(frozen=True)
class Crop:
    """A rectangle of whole pixels in the image's coordinates.

    ``width`` and ``height`` are equal except for the original's squashed images. Outside the image it shows
    the image's reflection, or mid-grey if ``mirrored`` is off.
    """

    x: int
    y: int
    width: int
    height: int
    mirrored: bool = True

    def scales(self, size: int) -> tuple[float, float]:
        """Return the factors along x and y that bring the crop to ``size`` x ``size`` pixels."""
        return size / self.width, size / self.height

    def to_output(self, box: Box, size: int) -> Box:
        """Return a box of the image in the pixels of the crop resized to ``size`` x ``size``."""
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
    """Shrink low..high to ``limit``; both ends move by the same share of their distance to the inner ends."""
    excess = (high - low) - limit
    if excess <= 0:
        return low, high
    slack_low, slack_high = inner_low - low, high - inner_high
    taken = min(max(round(excess * slack_low / (slack_low + slack_high)), excess - slack_high), slack_low)
    return low + taken, high - (excess - taken)


def _shrink_margin(crop: Crop, extended: Box, fraction: float, rng: np.random.Generator) -> Crop:
    """Move all four sides inwards by the same number of pixels, up to ``fraction`` of the smallest margin."""
    margin = min(
        extended.x1 - crop.x,
        extended.y1 - crop.y,
        crop.x + crop.width - extended.x2,
        crop.y + crop.height - extended.y2,
    )
    inset = int(rng.integers(0, max(int(fraction * margin), 0) + 1))
    return Crop(crop.x + inset, crop.y + inset, crop.width - 2 * inset, crop.height - 2 * inset)


def padded_square(width: int, height: int, side: int, *, mirrored: bool = True) -> Crop:
    """Return the square of ``side`` pixels around an image's middle; it may reach beyond the image."""
    return Crop((width - side) // 2, (height - side) // 2, side, side, mirrored)


def _offset_range(low: float, high: float, length: int, side: int) -> tuple[int, int]:
    """Return the first and last start of a window of ``side`` that holds low..high inside 0..length.

    Ends may be a rounding error below a whole pixel.
    """
    return max(0, int(high) - side), min(length - side, int(low + ROUNDING))


def plan_square_crop(
    box: Box, extended: Box, width: int, height: int, shrink_fraction: float, rng: np.random.Generator
) -> CropPlan:
    """Choose a square crop that contains the extended box; both boxes are of whole pixels.

    An extended box longer than the image's short side is shrunk (event ``shrunk``); if the box itself is
    longer, the crop reaches beyond the image (``padded``). ``shrink_fraction`` is the largest shrinkage of
    the square on all sides, as a share of its smallest margin. Advances ``rng``.
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
    """Choose a crop as the original code does: with fewer than two possible positions, squash the image.

    Square images are neither cropped nor shrunk. The event ``squashed`` marks a changed aspect ratio.
    """
    side = min(width, height)
    wide = width > height
    ends = (extended.x1, extended.x2) if wide else (extended.y1, extended.y2)
    low, high = _offset_range(*ends, max(width, height), side)
    start = int(rng.integers(low, high + 1)) if low < high else 0
    if width == height or low >= high:
        return CropPlan(Crop(0, 0, width, height), extended, () if width == height else ("squashed",))
    crop = Crop(start, 0, side, side) if wide else Crop(0, start, side, side)
    return CropPlan(_shrink_margin(crop, extended, shrink_fraction, rng), extended)


def resize_area(image: np.ndarray, width: int, height: int, enlarging: int = cv2.INTER_AREA) -> np.ndarray:
    """Resize ``h w ...`` by area: each pixel is the mean of what it covers, along both axes.

    OpenCV's ``INTER_AREA`` averages only if neither axis grows; if one shrinks and the other grows, it looks
    at just two pixels of the shrinking one. Such axes are resized one after the other, the growing one with
    the filter ``enlarging``. Takes uint8 or float32.
    """
    rows, columns = image.shape[:2]
    if (width < columns and height > rows) or (width > columns and height < rows):
        between = min(width, columns), min(height, rows)
        image = cv2.resize(image, between, interpolation=cv2.INTER_AREA)
        return cv2.resize(image, (width, height), interpolation=enlarging)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def resize(image: np.ndarray, width: int, height: int, antialias_above: float = 1.0) -> np.ndarray:
    """Resize a uint8 image ``h w c`` or ``h w``, in uint8.

    If a side shrinks by more than ``antialias_above``, sides that shrink are averaged by area, and then those
    that grow are interpolated; otherwise both are interpolated bilinearly (``INTER_LINEAR``).
    """
    factor = max(image.shape[1] / width, image.shape[0] / height)
    if factor > antialias_above:
        return resize_area(image, width, height, enlarging=cv2.INTER_LINEAR)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def window(image: np.ndarray, crop: Crop, fill: int = GREY) -> np.ndarray:
    """Cut a crop out of an image, uint8 ``h w ...``, at its own size: a view if nothing is padded.

    ``fill`` is the value outside the image if that is not its reflection.
    """
    height, width = image.shape[:2]
    left, top = max(-crop.x, 0), max(-crop.y, 0)
    right, bottom = max(crop.x + crop.width - width, 0), max(crop.y + crop.height - height, 0)
    if left or top or right or bottom:
        border = cv2.BORDER_REFLECT_101 if crop.mirrored else cv2.BORDER_CONSTANT
        image = cv2.copyMakeBorder(image, top, bottom, left, right, border, value=[fill] * 3)
    x, y = crop.x + left, crop.y + top
    return image[y : y + crop.height, x : x + crop.width]


def cut(image: np.ndarray, crop: Crop, size: int, antialias_above: float = 1.0) -> np.ndarray:
    """Cut a crop out of an image (uint8 ``h w 3``), padded as the crop says, at ``size`` x ``size``.

    It is cropped first and then resized; ``antialias_above`` as in :func:`resize`.
    """
    return resize(window(image, crop), size, size, antialias_above)


def _shown_pixels(start: int, length: int, side: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last pixel, along one axis, that each pixel of a resized crop shows.

    Inside the image a pixel shows itself. Outside, the image is read back and forth between the centres of
    its first and last pixels, as ``BORDER_REFLECT_101`` does. ``start`` and ``length`` of the crop and
    ``side`` of the image (at least 2) are pixels of the image; ``size`` is the resized crop's.
    """
    scale, span, own = length / size, side - 1, np.arange(size)
    edges = start + np.arange(size + 1) * scale
    turns = np.floor((edges - 0.5) / span)
    places = edges - 0.5 - turns * span
    places = np.where(turns % 2 == 0, places, span - places)
    first, last = np.minimum(places[:-1], places[1:]), np.maximum(places[:-1], places[1:])
    # If reading turns back within a pixel, it also shows the image's first or last one.
    passed, at_first = np.diff(turns), turns[1:] % 2 == 0
    first = np.where((passed > 1) | ((passed == 1) & at_first), 0.0, first)
    last = np.where((passed > 1) | ((passed == 1) & ~at_first), float(span), last)
    low = np.floor((first + 0.5 - start) / scale + 1e-6).clip(0, size - 1).astype(int)
    high = np.ceil((last + 0.5 - start) / scale - 1e-6).clip(1, size).astype(int) - 1
    inside = (edges[:-1] > -1e-6) & (edges[1:] < side + 1e-6)
    return np.where(inside, own, low), np.where(inside, own, np.maximum(low, high))


def _any_between(mask: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return for each pair of rows whether a mask is set in or between them; bool, column by column."""
    sums = np.zeros((len(mask) + 1, mask.shape[1]), np.int32)
    np.cumsum(mask > 0, axis=0, out=sums[1:])
    return sums[last + 1] > sums[first]


def mirror_mask(mask: np.ndarray, crop: Crop, width: int, height: int) -> np.ndarray:
    """Hide in a crop's padding the reflection of everything that a mask hides in the image.

    The mask, uint8 ``s s`` of 0 and 255, belongs to the resized crop of an image of ``width`` x ``height``.
    """
    size = len(mask)
    padded = crop.x < 0 or crop.y < 0 or crop.x + crop.width > width or crop.y + crop.height > height
    if not (padded and crop.mirrored):
        return mask
    shown = _any_between(mask, *_shown_pixels(crop.y, crop.height, height, size))
    shown = _any_between(shown.T, *_shown_pixels(crop.x, crop.width, width, size)).T
    return np.where(shown, np.uint8(255), mask)


def _pixels_inside(low: float, high: float, size: int) -> slice:
    """Return the pixels of 0..size that lie wholly in low..high, or if there are none, the middle one."""
    low, high = max(low, 0.0), min(high, float(size))
    first, last = math.ceil(low - 1e-6), math.floor(high + 1e-6)
    if first >= last:
        first = min(int((low + high) / 2), size - 1)
        last = first + 1
    return slice(first, last)


def valid_mask(crop: Crop, width: int, height: int, size: int) -> np.ndarray:
    """Return uint8 ``size size``: 255 where a pixel of the resized crop lies inside the image, else 0.

    An image that became thinner than a pixel gets the row or column along its middle.
    """
    inside = crop.to_output(Box(0.0, 0.0, float(width), float(height)), size)
    mask = np.zeros((size, size), np.uint8)
    mask[_pixels_inside(inside.y1, inside.y2, size), _pixels_inside(inside.x1, inside.x2, size)] = 255
    return mask
