"""From encoded bytes to uint8 RGB, at a half, a quarter or an eighth of the size where less is enough.

What cannot be used is told apart by reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from pbe.config import DataConfig
from pbe.data.samples.colour import on_white, to_srgb
from pbe.data.samples.masks import Box
from pbe.data.shards.format import digest as digest_of

# The reasons, which stand in the indexes of latent caches too.
UNREADABLE = "unreadable image"
DAMAGED = "image of another hash"
MISSING_SHARD = "missing shard"
BAD_INDEX = "unreadable index"
BAD_ANNOTATION = "unreadable annotation"
WITHOUT_BOXES = "annotation without 'boxes'"
TINY = "image under 2 px"
SIZE_MISMATCH = "image of another size than annotated"
NO_BOX = "no valid box"
AREA = "no box of the wanted area"
FAULTS = frozenset((
    UNREADABLE, DAMAGED, MISSING_SHARD, BAD_INDEX, BAD_ANNOTATION, WITHOUT_BOXES, TINY, SIZE_MISMATCH, NO_BOX,
))  # fmt: skip
# OpenCV has names for the reduced flags with BGR only; these bits beside that of RGB mean the same.
COLOUR = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
FACTORS = (8, 4, 2)
MIN_REDUCED_SIDE = 2.0  # of a box
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


class UnusableImageError(Exception):
    """An image is no use; ``reason`` is one of this module's constants."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(encoded: bytes, flags: int) -> np.ndarray:
    """Decode an image as OpenCV's ``flags`` say.

    Raises:
        UnusableImageError: it cannot be decoded.
    """
    try:
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:
        raise UnusableImageError(UNREADABLE) from error
    if decoded is None:
        raise UnusableImageError(UNREADABLE)
    return decoded


def decode_image(encoded: bytes, frame: tuple[int, int] | None = None, reduction: int = 1) -> np.ndarray:
    """Decode a JPEG, PNG or WebP file to uint8 ``h w 3``, RGB, turned as its EXIF orientation says.

    Grey images, palettes, CMYK and 16 bits become RGB of 8 bits; an ICC profile that is not sRGB's is
    applied; transparent parts are laid on white; of an animation the first image counts.

    Args:
        encoded: the file.
        frame: width and height that the boxes were annotated in. Where only the stored image has them, not
            the turned one, the boxes were drawn without regard to the orientation, and it is left out.
        reduction: 1, 2, 4 or 8: decode only so small a part of a frame whose sides it divides. Each pixel is
            about the mean of those it stands for (a JPEG's blocks are transformed back at the smaller size).

    Raises:
        UnusableImageError: where it is damaged, or of neither size. A JPEG that was cut short counts as
            damaged too; OpenCV would fill it up with grey.
    """
    if encoded[:2] == JPEG_START and JPEG_END not in encoded[len(encoded) // 2 :]:
        raise UnusableImageError(UNREADABLE)
    image = decode(encoded, COLOUR[reduction])
    size = image.shape[1::-1]
    frame = None if frame is None else (frame[0] // reduction, frame[1] // reduction)
    if frame is None or size == frame:
        return on_white(to_srgb(image, encoded), encoded)
    if size == frame[::-1]:
        stored = decode(encoded, COLOUR[reduction] | cv2.IMREAD_IGNORE_ORIENTATION)
        if stored.shape[1::-1] == frame:
            return on_white(to_srgb(stored, encoded), encoded, turned=False)
    raise UnusableImageError(SIZE_MISMATCH)


def check_hash(encoded: bytes, digest: bytes) -> None:
    """Compare an encoded image with the hash of it that the index holds.

    Raises:
        UnusableImageError: where they differ. Damaged images often still decode.
    """
    if digest_of(encoded) != digest:
        raise UnusableImageError(DAMAGED)


def smallest_crop(frame: tuple[int, int], longer: float, shrink_fraction: float) -> float:
    """Return a length that no crop's side can fall below, pixels.

    A crop starts at the short side or more, and gives up ``shrink_fraction`` of the least margin on all
    sides of the extended box, which is at least as long as the box.

    Args:
        frame: width and height of the image.
        longer: least longer side of the boxes that may be drawn.
        shrink_fraction: as in :class:`pbe.config.SampleConfig`.
    """
    side = min(frame)
    return side - shrink_fraction * max(side - longer, 0.0)


def choose_reduction(encoded: bytes, frame: tuple[int, int], boxes: Sequence[Box], config: DataConfig) -> int:
    """Return the largest factor by which an image may be smaller when it is decoded: 1, 2, 4 or 8.

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
    longer = min(max(box.width, box.height) for box in boxes)
    crop = smallest_crop(frame, longer, config.sample.shrink_fraction)
    shorter = min(min(box.width, box.height) for box in boxes)
    limit = min(crop / config.image_size, longer / config.exemplar_size, shorter / MIN_REDUCED_SIDE)
    fitting = (factor for factor in FACTORS if factor <= limit and not any(side % factor for side in frame))
    return next(fitting, 1)


def reduced_box(box: Box, factor: int) -> Box:
    """Return a box in the pixels of the reduced image."""
    return Box(box.x1 / factor, box.y1 / factor, box.x2 / factor, box.y2 / factor)
