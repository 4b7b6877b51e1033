"""Masks of training samples: the extended box, arbitrary shapes by Bezier curves, and the object's own mask.

Paint by Example, section 3.3 ("mask shape augmentation"). An object's mask lies in the JSON of its image as
COCO's run-length code of the whole image, upright as the image is shown; ``pbe prepare`` puts it there for
sources that have masks. It is cut like the image, and dilated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pbe.data.samples.crops import Box, Crop, resize_area, window
from pbe.data.samples.decode import BAD_ANNOTATION, UnusableImageError, unusable

if TYPE_CHECKING:  # packing needs no more of this module than run-length codes
    from pbe.data.shards.archive import ShardImages

CURVE_TIMES = 0.05 * np.arange(1, 19)
SUBPIXEL_BITS = 4
ObjectMask = Callable[[], np.ndarray | None]

# Of a compressed run-length text: every run (from the fourth on, its difference to the run two before) is cut
# into groups of five bits, the lowest first; bit 5 says that more follow; 48 makes it a printable character.
CONTINUES, SIGN, GROUP_BITS, BASE = 0x20, 0x10, 5, 48
MAX_SHIFT = 60  # bits of a run; no mask has more pixels
MAX_PIXELS = 2**31


def extend_box(box: Box, width: int, height: int, fraction: float, rng: np.random.Generator) -> Box:
    """Move each side outwards by whole pixels, uniform from 0 to ``fraction`` of the free space on that side.

    The box lies inside an image of ``width`` x ``height``; ``rng`` is advanced by four draws.
    """
    free = np.array([box.x1, box.y1, width - box.x2, height - box.y2])
    choices = np.floor(fraction * free) + 1
    left, top, right, bottom = np.floor(rng.random(4) * choices).tolist()
    return Box(box.x1 - left, box.y1 - top, box.x2 + right, box.y2 + bottom)


def rectangle_mask(box: Box, width: int, height: int) -> np.ndarray:
    """Return a uint8 mask ``height width``: 255 on every pixel that the box touches, 0 elsewhere."""
    mask = np.zeros((height, width), np.uint8)
    mask[box.rounded_out(width, height).pixels()] = 255
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
    """Draw an arbitrary shape around a box, uint8 ``height width`` of 0 and 255: four jittered Bezier curves.

    A point moves by at most ``jitter`` pixels along x and along y. The shape stays within the extended box
    plus the jitter and covers at least the share ``min_box_cover`` of the box's pixels: the jitter is drawn
    from ``rng`` up to ``tries`` times until it does, and then left out.
    """
    points = curve_points(box, extended)
    limit = Box(
        extended.x1 - jitter[0], extended.y1 - jitter[1], extended.x2 + jitter[0], extended.y2 + jitter[1]
    )
    allowed = rectangle_mask(limit, width, height)
    inner = box.rounded_out(width, height)
    for _ in range(tries):
        moved = points + rng.uniform(-1.0, 1.0, points.shape) * jitter
        mask = cv2.bitwise_and(_fill(moved, width, height), allowed)
        if cv2.countNonZero(mask[inner.pixels()]) >= min_box_cover * inner.area:
            return mask
    # Tiny boxes can lose a tenth of their pixels to the cut corners alone; then the corners are filled too.
    mask = cv2.bitwise_and(_fill(points, width, height), allowed)
    if cv2.countNonZero(mask[inner.pixels()]) < min_box_cover * inner.area:
        mask[inner.pixels()] = 255
    return mask


def _entry(annotation: dict[str, Any], box: Box, width: int, height: int) -> dict[str, Any]:
    """Return the JSON entry of a box that was clipped to the image; the first of several equal ones."""
    for entry in annotation["boxes"]:
        if Box(*(float(value) for value in entry["xyxy"])).clipped(width, height) == box:
            return dict(entry)
    raise ValueError("the annotation does not hold the box")


def read_object_mask(
    images: ShardImages, position: int, box: Box, frame: tuple[int, int], size: tuple[int, int]
) -> np.ndarray | None:
    """Return the mask of the object in a box, uint8 ``h w`` of 0 and 1; None if the shard holds none.

    The box is one of the annotation's, clipped to its frame (width and height). The mask has ``size``, which
    may be smaller: the image may have been decoded at a smaller size. A mask without any pixel in the box
    counts as none.

    Raises:
        UnusableImageError: the annotation cannot be read, or its mask belongs to another image.
    """
    width, height = frame
    with unusable():
        code = _entry(images.annotation(position), box, width, height).get("mask")
        mask = None if code is None else decode_rle(code)
    if mask is None:
        return None
    if mask.shape != (height, width):
        raise UnusableImageError(BAD_ANNOTATION)
    if not mask[box.rounded_out(width, height).pixels()].any():
        return None
    return mask if size == frame else (_shrink(mask, size) > 0).astype(np.uint8)


def _shrink(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the share of each pixel that is not zero, float32, by area; ``size`` is width and height."""
    return resize_area((mask != 0).astype(np.float32), *size)


def cut_mask(mask: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """Return the share of each pixel that the object covers, float32 ``size size``, 0 to 1.

    The mask of the whole image, uint8 ``h w``, is cropped, padded and resized as the image is, by area: where
    the padding is the image's reflection, the object is reflected with it.
    """
    return _shrink(window(mask, crop, fill=0), (size, size))


def dilated_mask(cover: np.ndarray, radius: tuple[float, float]) -> np.ndarray:
    """Return the mask, uint8 ``s s``: 255 on every pixel that the object of :func:`cut_mask` touches.

    It is dilated by an ellipse whose half axes along x and y are the radius, pixels.
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


def _text_to_runs(text: str) -> list[int]:
    """Return the runs of a compressed text; ValueError where it is cut short or no such text."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - BASE
        if not 0 <= group < 64:
            raise ValueError(f"run-length text holds {character!r}")
        if shift > MAX_SHIFT:
            raise ValueError("a run-length text holds a run longer than any mask")
        value |= (group & 0x1F) << shift
        shift += GROUP_BITS
        if group & CONTINUES:
            continue
        if group & SIGN:
            value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("run-length text is cut short")
    return runs


def _runs_to_text(runs: Sequence[int]) -> str:
    characters = []
    for position, run in enumerate(runs):
        value = run - runs[position - 2] if position > 2 else run
        more = True
        while more:
            group = value & 0x1F
            value >>= GROUP_BITS
            more = value != (-1 if group & SIGN else 0)
            characters.append(chr((group | (CONTINUES if more else 0)) + BASE))
    return "".join(characters)


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Return ``{"size": [h, w], "counts": text}`` of a mask, ``h w``; what is not zero counts as one.

    The runs are those of 0 and 1 in turn, down the columns, starting with 0.
    """
    flat = (mask != 0).T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    if flat.size and flat[0]:
        runs = [0, *runs]
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": _runs_to_text(runs)}


def decode_rle(mask: dict[str, Any]) -> np.ndarray:
    """Return the mask, uint8 ``h w`` of 0 and 1, of a run-length code, compressed (text) or not (list).

    Raises:
        ValueError: it is no such code, or its runs do not add up to its size.
    """
    try:
        height, width = (int(side) for side in mask["size"])
        counts = mask["counts"]
        runs = _text_to_runs(counts) if isinstance(counts, str) else [int(run) for run in counts]
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"no run-length mask: {error}") from error
    sensible = min(height, width, *runs) >= 0 and height * width <= MAX_PIXELS
    if not sensible or sum(runs) != height * width:
        raise ValueError(f"the runs of a mask do not add up to its size, {width} x {height}")
    values = np.arange(len(runs), dtype=np.uint8) & 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)
