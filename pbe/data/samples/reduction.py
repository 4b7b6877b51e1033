"""Which JPEGs may be decoded at a half, a quarter or an eighth of their size, because less is needed."""

from __future__ import annotations

from collections.abc import Sequence

from pbe.config import DataConfig
from pbe.data.samples.decode import JPEG_START
from pbe.data.samples.masks import Box

FACTORS = (8, 4, 2)
MIN_REDUCED_SIDE = 2.0  # of a box


def smallest_crop(frame: tuple[int, int], boxes: Sequence[Box], shrink_fraction: float) -> float:
    """Return a length that no crop's side can fall below, pixels.

    A crop starts at the short side or more, and gives up ``shrink_fraction`` of the least margin on all
    sides of the extended box, which is at least as long as the box.

    Args:
        frame: width and height of the picture.
        boxes: any of which may be drawn.
        shrink_fraction: as in :class:`pbe.config.SampleConfig`.
    """
    side = min(frame)
    box = min(max(box.width, box.height) for box in boxes)
    return side - shrink_fraction * max(side - box, 0.0)


def choose_reduction(encoded: bytes, frame: tuple[int, int], boxes: Sequence[Box], config: DataConfig) -> int:
    """Return the largest factor by which a picture may be smaller when it is decoded: 1, 2, 4 or 8.

    It divides width and height, so that boxes scale exactly; no crop becomes smaller than the training image,
    and no box's longer side shorter than the exemplar's. Only JPEGs decode faster when they are reduced.

    Args:
        encoded: the file.
        frame: width and height, as annotated.
        boxes: any of which may be drawn, pixels.
        config: sizes; where ``reduced_decoding`` is off the factor is 1.
    """
    if not config.reduced_decoding or not encoded.startswith(JPEG_START):
        return 1
    crop = smallest_crop(frame, boxes, config.sample.shrink_fraction)
    longer = min(max(box.width, box.height) for box in boxes)
    shorter = min(min(box.width, box.height) for box in boxes)
    limit = min(crop / config.image_size, longer / config.exemplar_size, shorter / MIN_REDUCED_SIDE)
    fitting = (factor for factor in FACTORS if factor <= limit and not any(side % factor for side in frame))
    return next(fitting, 1)


def reduced_box(box: Box, factor: int) -> Box:
    """Return a box in the pixels of the reduced picture."""
    return Box(box.x1 / factor, box.y1 / factor, box.x2 / factor, box.y2 / factor)
