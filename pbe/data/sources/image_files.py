"""Image files: finding them, headers, any format's first frame, hashes, and turning boxes as EXIF says."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from pbe.data.samples.crops import resize_area
from pbe.data.samples.decode import (
    JPEG_END,
    JPEG_START,
    UnusableImageError,
    convert_profile,
    decode,
    decode_image,
)
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
# EXIF's orientations; mirrored from left to right and from top to bottom before a transposition.
MIRRORED, UPSIDE_DOWN, TRANSPOSED = {2, 3, 7, 8}, {3, 4, 6, 7}, {5, 6, 7, 8}
CANNOT_DECODE = "cannot be decoded"
HASH_SIDE, HASH_BITS, MIN_CONTRAST = 32, 8, 2.0
REDUCED = ((512, cv2.IMREAD_REDUCED_GRAYSCALE_8), (256, cv2.IMREAD_REDUCED_GRAYSCALE_4))  # from a side on
NO_RANGE = "values beyond 16 bits, which are no colours"


class UnreadableImageError(Exception):
    """An image cannot be read; the text says why."""


def is_image(name: str) -> bool:
    """Whether the name's ending is that of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def need_folder(path: Path, meaning: str) -> Path:
    """Return ``path`` if it is a folder; else a UserError says what it should have been."""
    if not path.is_dir():
        raise UserError(f"{meaning} '{path}' {'is not a folder' if path.exists() else 'does not exist'}")
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
        with _opened(encoded) as image:
            extension, size = EXTENSIONS.get(image.format or "", ""), image.size
            # A block of EXIF that cannot be read turns nothing, and damage behind the first frame ends there.
            orientation = _tried(lambda: image.getexif().get(ORIENTATION_TAG, 1))
            frames = 1 if extension == "jpg" else _tried(lambda: int(getattr(image, "n_frames", 1)))
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        return _by_pixels(encoded, error)
    # OpenCV, with which images are decoded later, turns JPEG, PNG and WebP alike, but no other format.
    known = bool(extension) and isinstance(orientation, int) and 1 <= orientation <= 8
    return ImageHeader(extension, size, orientation if known else 1, frames)


@contextmanager
def _opened(encoded: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd tags and large images are no reason to speak
        with Image.open(io.BytesIO(encoded)) as image:
            yield image


def _tried(read: Callable[[], Any]) -> Any:
    """Return what a parser of Pillow's finds, or 1 where it fails, with whatever it stumbles over."""
    try:
        return read()
    except Exception:
        return 1


def _by_pixels(encoded: bytes, error: Exception) -> ImageHeader:
    """Return the header of an image that Pillow cannot open, and OpenCV decodes all the same."""
    reason = "no image" if isinstance(error, UnidentifiedImageError) else "damaged header"
    if isinstance(error, Image.DecompressionBombError):
        raise UnreadableImageError("too many pixels") from error
    extension = next((name for mark, name in STARTS.items() if encoded.startswith(mark)), "")
    if not extension:
        raise UnreadableImageError(reason) from error
    try:
        height, width = decode(encoded, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION).shape
    except UnusableImageError as damage:
        raise UnreadableImageError(reason) from damage
    return ImageHeader(extension, (width, height), 1, 1)


def first_frame(encoded: bytes) -> np.ndarray:
    """Decode the first frame of any format that Pillow knows to uint8 ``h w 3``, RGB, as stored.

    Colours become sRGB, and transparent parts are laid on white, as in :mod:`pbe.data.samples.decode`. Where
    its numbers have no meaning as colours, it is unreadable.
    """
    try:
        with _opened(encoded) as image:
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


def perceptual_hash(grey: np.ndarray) -> int:
    """Return a 64-bit hash of uint8 ``h w`` that survives scaling and recompression; 0 without structure.

    Signs, against their median, of the 64 lowest frequencies (without the constant) of a 32 x 32 image.
    """
    small = resize_area(grey, HASH_SIDE, HASH_SIDE).astype(np.float32)
    if small.std() < MIN_CONTRAST:
        return 0
    spectrum = cv2.dct(small)[: HASH_BITS + 1, : HASH_BITS + 1]
    values = np.concatenate([spectrum[:HASH_BITS, :HASH_BITS].ravel()[1:], spectrum[:1, HASH_BITS]])
    bits = values > np.median(values)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def check_and_hash(encoded: bytes, header: ImageHeader) -> int:
    """Return the perceptual hash of an image, decoded small where the format allows it."""
    if not header.extension or header.frames > 1:
        return perceptual_hash(cv2.cvtColor(first_frame(encoded), cv2.COLOR_RGB2GRAY))
    short = min(header.stored_size)
    flag = next((flag for side, flag in REDUCED if short >= side), cv2.IMREAD_GRAYSCALE)
    try:
        return perceptual_hash(decode(encoded, flag))
    except UnusableImageError as error:
        raise UnreadableImageError(CANNOT_DECODE) from error


def encode_again(encoded: bytes, header: ImageHeader, max_side: int, quality: int) -> tuple[bytes, str]:
    """Return an image that fits, upright, and its extension: PNG for what was lossless, else JPEG.

    ``max_side`` is the longest side of the result in pixels, 0 for no limit; shrinking averages areas.
    """
    try:
        plain = header.extension and header.frames == 1
        image = decode_image(encoded) if plain else first_frame(encoded)
    except UnusableImageError as error:
        raise UnreadableImageError(CANNOT_DECODE) from error
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    height, width = image.shape[:2]
    scale = max_side / max(width, height) if max_side else 1.0
    if scale < 1:
        image = resize_area(image, max(1, round(width * scale)), max(1, round(height * scale)))
    extension = "jpg" if header.extension in ("jpg", "webp") else "png"
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if extension == "jpg" else []
    return cv2.imencode(f".{extension}", image, options)[1].tobytes(), extension


def turn_boxes(boxes: np.ndarray, width: int, height: int, orientation: int) -> np.ndarray:
    """Turn boxes, ``n 4`` of x1 y1 x2 y2 in pixels, from the stored frame of that size to the displayed."""
    x1, y1, x2, y2 = boxes.T
    if orientation in MIRRORED:
        x1, x2 = width - x2, width - x1
    if orientation in UPSIDE_DOWN:
        y1, y2 = height - y2, height - y1
    turned = (y1, x1, y2, x2) if orientation in TRANSPOSED else (x1, y1, x2, y2)
    return np.stack(turned, axis=1)


def turn_image(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image or mask, ``h w`` or ``h w c``, from the stored frame into the displayed one."""
    image = image[:, ::-1] if orientation in MIRRORED else image
    image = image[::-1] if orientation in UPSIDE_DOWN else image
    return np.ascontiguousarray(image.swapaxes(0, 1) if orientation in TRANSPOSED else image)
