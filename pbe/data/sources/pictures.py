"""What a picture file says of itself: format, size, orientation; and boxes and masks turned with it."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from pbe.data.samples.decode import JPEG_END, JPEG_START, UnusableImageError, decode

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
STARTS = {JPEG_START: "jpg", PNG_START: "png"}
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
ORIENTATION_TAG = 0x0112
TRANSPOSED = frozenset({5, 6, 7, 8})


class UnreadablePictureError(Exception):
    """A picture cannot be read; the text says why."""


@dataclass(frozen=True)
class PictureHeader:
    """What stands at the start of a picture file.

    Attributes:
        extension: ``jpg``, ``png`` or ``webp``, or empty for a format that shards do not hold.
        width: pixels as stored, before the EXIF orientation.
        height: pixels as stored.
        orientation: EXIF's, 1 to 8.
        frames: more than one in an animation.
    """

    extension: str
    width: int
    height: int
    orientation: int
    frames: int

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height before the EXIF orientation."""
        return self.width, self.height

    @property
    def displayed_size(self) -> tuple[int, int]:
        """Width and height as shown, after the EXIF orientation."""
        return (self.height, self.width) if self.orientation in TRANSPOSED else (self.width, self.height)


def _check_whole(encoded: bytes) -> None:
    """Complain about a file that was cut short; decoders fill the rest with grey and say nothing."""
    if not encoded:
        raise UnreadablePictureError("empty file")
    whole = True
    if encoded[:2] == JPEG_START:
        whole = JPEG_END in encoded[len(encoded) // 2 :]
    elif encoded[:8] == PNG_START:
        whole = PNG_END in encoded
    elif encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        whole = len(encoded) >= 8 + int.from_bytes(encoded[4:8], "little")
    if not whole:
        raise UnreadablePictureError("cut short")


def inspect_picture(encoded: bytes) -> PictureHeader:
    """Read a picture's header.

    Raises:
        UnreadablePictureError: it is no picture, or was cut short.
    """
    _check_whole(encoded)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks and large pictures are no reason to speak
            with Image.open(io.BytesIO(encoded)) as picture:
                orientation, frames = _orientation(picture), _frames(picture)
                width, height = picture.size
                extension = EXTENSIONS.get(picture.format or "", "")
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        return _by_pixels(encoded, error)
    # OpenCV, with which pictures are decoded later, turns JPEG, PNG and WebP alike, but no other format.
    return PictureHeader(extension, width, height, orientation if extension else 1, frames)


def _orientation(picture: Image.Image) -> int:
    """Return EXIF's orientation; a block that cannot be read turns nothing, and harms no pixel."""
    try:
        orientation = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # its parser raises whatever it stumbles over
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _frames(picture: Image.Image) -> int:
    if picture.format in ("JPEG", "MPO"):
        return 1
    try:
        return int(getattr(picture, "n_frames", 1))
    except Exception:  # damage behind the first frame
        return 1


def _by_pixels(encoded: bytes, error: Exception) -> PictureHeader:
    """Return the header of a picture that Pillow cannot open, and OpenCV decodes all the same.

    Raises:
        UnreadablePictureError: it does not either.
    """
    start = next((name for mark, name in STARTS.items() if encoded.startswith(mark)), "")
    if start and not isinstance(error, Image.DecompressionBombError):
        flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            height, width = decode(encoded, flags).shape[:2]
        except UnusableImageError as damage:
            raise UnreadablePictureError(_reason(error)) from damage
        return PictureHeader(start, width, height, 1, 1)
    raise UnreadablePictureError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no picture"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    return "damaged header"


def turn_boxes(boxes: np.ndarray, width: int, height: int, orientation: int) -> np.ndarray:
    """Turn boxes from the stored frame into the displayed one.

    Args:
        boxes: ``n 4``, x1 y1 x2 y2 in pixels of the stored frame.
        width: of the stored picture.
        height: of the stored picture.
        orientation: EXIF's, 1 to 8.

    Returns:
        ``n 4``, in pixels of the displayed frame.
    """
    x1, y1, x2, y2 = boxes.T
    if orientation in (2, 3, 7, 8):  # mirrored from left to right, before a transposition
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    turned = (y1, x1, y2, x2) if orientation in TRANSPOSED else (x1, y1, x2, y2)
    return np.stack(turned, axis=1)


def turn_image(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn a picture or mask, ``h w`` or ``h w c``, from the stored frame into the displayed one."""
    if orientation in (2, 3, 7, 8):
        image = image[:, ::-1]
    if orientation in (3, 4, 6, 7):
        image = image[::-1]
    if orientation in TRANSPOSED:
        image = image.swapaxes(0, 1)
    return np.ascontiguousarray(image)
