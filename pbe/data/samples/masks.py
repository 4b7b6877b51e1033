"""Masks of training samples: the extended box, and arbitrary shapes bounded by Bezier curves.

Paint by Example, section 3.3 ("mask shape augmentation"). All coordinates are pixels of the image that
the mask is drawn for, as continuous numbers: pixel i covers the interval from i to i + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

CURVE_TIMES = 0.05 * np.arange(1, 19)
SUBPIXEL_BITS = 4


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
        # A hair of tolerance keeps 12.000000001 from claiming a thirteenth pixel.
        low_x, low_y = math.floor(self.x1 + 1e-6), math.floor(self.y1 + 1e-6)
        high_x, high_y = math.ceil(self.x2 - 1e-6), math.ceil(self.y2 - 1e-6)
        return Box(
            float(max(low_x, 0)), float(max(low_y, 0)), float(min(high_x, width)), float(min(high_y, height))
        )


def extend_box(box: Box, width: int, height: int, fraction: float, rng: np.random.Generator) -> Box:
    """Move each side outwards by whole pixels, uniform from 0 to ``fraction`` of the free space on that side.

    Args:
        box: inside the image.
        width: of the image.
        height: of the image.
        fraction: 0 to 1.
        rng: generator that is advanced by four draws.
    """
    free = np.array([box.x1, box.y1, width - box.x2, height - box.y2])
    choices = np.floor(fraction * free) + 1
    left, top, right, bottom = np.floor(rng.random(4) * choices).tolist()
    return Box(box.x1 - left, box.y1 - top, box.x2 + right, box.y2 + bottom)


def rectangle_mask(box: Box, width: int, height: int) -> np.ndarray:
    """Return a uint8 mask ``height width``: 255 on every pixel that the box touches, 0 elsewhere."""
    whole = box.rounded_out(width, height)
    mask = np.zeros((height, width), np.uint8)
    mask[int(whole.y1) : int(whole.y2), int(whole.x1) : int(whole.x2)] = 255
    return mask


def curve_points(box: Box, extended: Box) -> np.ndarray:
    """Sample the four quadratic Bezier curves around a box, clockwise from the top left corner.

    Each runs from corner to corner of the box; its control point is the side's midpoint pushed out to the
    extended box, so that the curve bulges half-way. B(t) = (1-t)^2 P0 + 2t(1-t) P1 + t^2 P2.

    Returns:
        Points ``(72, 2)``, 18 a curve at t = 0.05 to 0.9.
    """
    middle_x, middle_y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    corners = np.array([[box.x1, box.y1], [box.x2, box.y1], [box.x2, box.y2], [box.x1, box.y2]])
    controls = np.array(
        [[middle_x, extended.y1], [extended.x2, middle_y], [middle_x, extended.y2], [extended.x1, middle_y]]
    )
    t = CURVE_TIMES[None, :, None]
    curves = (
        (1 - t) ** 2 * corners[:, None]
        + 2 * t * (1 - t) * controls[:, None]
        + t**2 * np.roll(corners, -1, axis=0)[:, None]
    )
    return curves.reshape(-1, 2)


def _fill(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Fill a polygon given in continuous coordinates; uint8 ``height width``, 0 or 255."""
    mask = np.zeros((height, width), np.uint8)
    # OpenCV's coordinates are those of pixel centres.
    fixed = np.rint((points - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)
    cv2.fillPoly(mask, [fixed], 255, shift=SUBPIXEL_BITS)
    return mask


def bezier_mask(
    box: Box,
    extended: Box,
    width: int,
    height: int,
    jitter: tuple[float, float],
    rng: np.random.Generator,
    min_box_cover: float = 0.9,
    tries: int = 8,
) -> np.ndarray:
    """Draw an arbitrary shape around a box: jittered points on four Bezier curves, filled.

    The shape stays within the extended box plus the jitter and covers at least ``min_box_cover`` of the
    pixels of the box: the jitter is drawn again from the same generator until it does, at last left out.

    Args:
        box: around the object.
        extended: contains the box.
        width: of the mask, pixels.
        height: of the mask, pixels.
        jitter: largest shift of a point along x and along y, pixels.
        rng: generator that is advanced.
        min_box_cover: 0 to 1.
        tries: draws of the jitter.

    Returns:
        uint8 mask ``height width``: 255 inside the shape, 0 elsewhere.
    """
    points = curve_points(box, extended)
    limit = Box(
        extended.x1 - jitter[0], extended.y1 - jitter[1], extended.x2 + jitter[0], extended.y2 + jitter[1]
    )
    allowed = rectangle_mask(limit, width, height)
    inner = box.rounded_out(width, height)
    window = (slice(int(inner.y1), int(inner.y2)), slice(int(inner.x1), int(inner.x2)))
    for _ in range(tries):
        moved = points + rng.uniform(-1.0, 1.0, points.shape) * jitter
        mask = cv2.bitwise_and(_fill(moved, width, height), allowed)
        if cv2.countNonZero(mask[window]) >= min_box_cover * inner.area:
            return mask
    # Tiny boxes can lose a tenth of their pixels to the cut corners alone; then the corners are filled too.
    mask = cv2.bitwise_and(_fill(points, width, height), allowed)
    if cv2.countNonZero(mask[window]) < min_box_cover * inner.area:
        mask[window] = 255
    return mask
