"""Image files: finding them, their headers, any format's first frame, and turning boxes as EXIF says."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from pbe.data.samples.decode import JPEG_END, JPEG_START, UnusableImageError, convert_profile, decode
from pbe.errors import UserError

# What is no JPEG, PNG or WebP is encoded again when it is packed, or counted as what Pillow cannot read.
IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff",
        ".avif", ".heic", ".heif", ".jp2", ".tga", ".ppm", ".pgm",
    }
)  # fmt: skip
SYSTEM_FILES = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})  # others of macOS begin with a dot

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
STARTS = {JPEG_START: "jpg", PNG_START: "png"}
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
ORIENTATION_TAG = 0x0112
TRANSPOSED = frozenset({5, 6, 7, 8})
CANNOT_DECODE = "cannot be decoded"
NO_RANGE = "values beyond 16 bits, which are no colours"


def is_image(name: str) -> bool:
    """Whether the name's ending is that of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def need_folder(path: Path, meaning: str) -> Path:
    """Return ``path`` if it is a folder; else a UserError says what it should have been."""
    if not path.is_dir():
        raise UserError(f"{meaning} '{path}' is not a folder")
    return path


def need_file(path: Path, meaning: str) -> Path:
    """Return ``path`` if it is a file; else a UserError says what it should have been."""
    if not path.is_file():
        raise UserError(f"{meaning} '{path}' is not a file")
    return path


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield (name within the root, bytes) of every file below ``folder`` that is not hidden."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in SYSTEM_FILES:
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size


def find_files(folder: Path) -> tuple[list[tuple[str, int]], int]:
    """Return (name within ``folder``, bytes) of all files, sorted, and how many names are not UTF-8."""
    try:
        found = sorted(_walk(str(folder), ""))
    except OSError as error:
        raise UserError(f"cannot read '{error.filename or folder}': {error.strerror}") from error
    # What cannot be decoded is a lone surrogate in Python's names.
    good = [file for file in found if file[0].encode(errors="replace").decode() == file[0]]
    return good, len(found) - len(good)


class UnreadableImageError(Exception):
    """An image cannot be read; the text says why."""


@dataclass(frozen=True)
class ImageHeader:
    """What stands at the start of an image file."""

    extension: str  # jpg, png or webp, or empty for a format that shards do not hold
    stored_size: tuple[int, int]  # width and height in pixels, before the EXIF orientation
    orientation: int  # EXIF's, 1 to 8
    frames: int  # more than one in an animation

    @property
    def displayed_size(self) -> tuple[int, int]:
        """Width and height as shown, after the EXIF orientation."""
        width, height = self.stored_size
        return (height, width) if self.orientation in TRANSPOSED else (width, height)


def _check_whole(encoded: bytes) -> None:
    """Complain about a file that was cut short; decoders fill the rest with grey and say nothing."""
    if not encoded:
        raise UnreadableImageError("empty file")
    whole = True
    if encoded[:2] == JPEG_START:
        whole = JPEG_END in encoded[len(encoded) // 2 :]
    elif encoded[:8] == PNG_START:
        whole = PNG_END in encoded
    elif encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        whole = len(encoded) >= 8 + int.from_bytes(encoded[4:8], "little")
    if not whole:
        raise UnreadableImageError("cut short")


def inspect_image(encoded: bytes) -> ImageHeader:
    """Read an image's header; UnreadableImageError where it is no image, or was cut short."""
    _check_whole(encoded)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks and large images are no reason to speak
            with Image.open(io.BytesIO(encoded)) as image:
                orientation, frames, size = _orientation(image), _frames(image), image.size
                extension = EXTENSIONS.get(image.format or "", "")
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        return _by_pixels(encoded, error)
    # OpenCV, with which images are decoded later, turns JPEG, PNG and WebP alike, but no other format.
    return ImageHeader(extension, size, orientation if extension else 1, frames)


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation; a block that cannot be read turns nothing, and harms no pixel."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # its parser raises whatever it stumbles over
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _frames(image: Image.Image) -> int:
    if image.format in ("JPEG", "MPO"):
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # damage behind the first frame
        return 1


def _by_pixels(encoded: bytes, error: Exception) -> ImageHeader:
    """Return the header of an image that Pillow cannot open, and OpenCV decodes all the same."""
    reason = "damaged header"
    if isinstance(error, UnidentifiedImageError):
        reason = "no image"
    if isinstance(error, Image.DecompressionBombError):
        raise UnreadableImageError("too many pixels") from error
    extension = next((name for mark, name in STARTS.items() if encoded.startswith(mark)), "")
    if not extension:
        raise UnreadableImageError(reason) from error
    try:
        height, width = decode(encoded, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION).shape[:2]
    except UnusableImageError as damage:
        raise UnreadableImageError(reason) from damage
    return ImageHeader(extension, (width, height), 1, 1)


def first_frame(encoded: bytes) -> np.ndarray:
    """Decode the first frame of any format that Pillow knows to uint8 ``h w 3``, RGB, as stored.

    Colours become sRGB, and transparent parts are laid on white, as in :mod:`pbe.data.samples.decode`.

    Raises:
        UnreadableImageError: it cannot be decoded, or its numbers have no meaning as colours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tags and large images; what matters is an error
            with Image.open(io.BytesIO(encoded)) as image:
                return _colours(image)
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise UnreadableImageError(CANNOT_DECODE) from error


def _colours(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
        deep = np.asarray(image).astype(np.int64)
        if deep.min(initial=0) < 0 or deep.max(initial=0) > 0xFFFF:
            raise UnreadableImageError(NO_RANGE)
        return cv2.cvtColor((deep >> 8).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    if image.mode == "F":
        raise UnreadableImageError(NO_RANGE)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return np.array(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
    profile = image.info.get("icc_profile")
    pixels = np.array(image.convert("RGB"))
    return convert_profile(pixels, profile) if profile else pixels


def turn_boxes(boxes: np.ndarray, width: int, height: int, orientation: int) -> np.ndarray:
    """Turn boxes, ``n 4`` of x1 y1 x2 y2 in pixels, from the stored frame of that size to the displayed."""
    x1, y1, x2, y2 = boxes.T
    if orientation in (2, 3, 7, 8):  # mirrored from left to right, before a transposition
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    turned = (y1, x1, y2, x2) if orientation in TRANSPOSED else (x1, y1, x2, y2)
    return np.stack(turned, axis=1)


def turn_image(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image or mask, ``h w`` or ``h w c``, from the stored frame into the displayed one."""
    if orientation in (2, 3, 7, 8):
        image = image[:, ::-1]
    if orientation in (3, 4, 6, 7):
        image = image[::-1]
    if orientation in TRANSPOSED:
        image = image.swapaxes(0, 1)
    return np.ascontiguousarray(image)
