"""Image files: decoded, turned upright, and with a colour profile that fits or is applied. No torch here."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from pbe.errors import EditValueError, first_line, warn_once

PNG_START = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
ORIENTATION = 0x0112
TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(content: bytes) -> Image.Image:
    """Return the first frame of an image file, decoded and upright.

    Of a PNG whose other chunks are damaged only those with a right checksum are read, and if that does not
    help, only those that hold the pixels.
    """
    if not content:
        raise EditValueError("is an empty file")
    failure: Exception | None = None
    for attempt in _attempts(content):
        try:
            image = Image.open(io.BytesIO(attempt))
            image.load()
            return upright(image)
        except Image.DecompressionBombError as error:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise EditValueError(
                f"is too large: images of more than {most:,} pixels are not read; reduce it first"
            ) from error
        except Exception as error:  # decoders raise nearly anything on damaged files
            failure = error
    if isinstance(failure, UnidentifiedImageError):
        raise EditValueError("is not an image of a known format") from failure
    raise EditValueError(f"is damaged or cannot be decoded: {first_line(failure)}") from failure


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; without a readable one it stays as it is."""
    turn = needed_turn(image)
    return image if turn is None else image.transpose(turn)


def needed_turn(image: Image.Image) -> Image.Transpose | None:
    """Return what turns an image upright by its EXIF orientation; None where it is or says nothing."""
    try:
        image.load()  # Pillow turns a TIFF by itself here
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # any damage of the metadata, which Pillow reports in as many ways
        return None


def _attempts(content: bytes) -> Iterator[bytes]:
    yield content
    if content.startswith(PNG_START):
        chunks = list(_chunks(content))
        yield PNG_START + b"".join(chunk for name, chunk, sound in chunks if sound or name in PIXEL_CHUNKS)
        yield PNG_START + b"".join(chunk for name, chunk, _ in chunks if name in PIXEL_CHUNKS)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Yield name, bytes and whether the checksum is right of every chunk of a PNG, the last perhaps cut."""
    start = len(PNG_START)
    while start + 8 <= len(content):
        length, name = struct.unpack(">I4s", content[start : start + 8])
        end = start + 12 + length
        checksum = struct.pack(">I", zlib.crc32(content[start + 4 : end - 4]))
        yield name, content[start:end], content[end - 4 : end] == checksum
        start = end


GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})
LEAST_DPI, MOST_DPI = 2, 65535  # a TIFF without a unit says 1; a JPEG can say no more


@dataclass(frozen=True)
class Profile:
    """A colour profile (ICC) that fits its image and describes ``RGB``, ``GRAY`` or ``CMYK``."""

    content: bytes
    space: str

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """Convert an image of mode RGB, L or CMYK, whichever the profile describes, to RGB in sRGB."""
        converted = _to_srgb(image, ImageCms.ImageCmsProfile(io.BytesIO(self.content)))
        if self.space == "RGB":  # sRGB under another name: what the rounding changes is no change of colour
            change = np.asarray(converted).astype(np.int16) - np.asarray(image)
            if np.abs(change).max() <= 1:
                return image
        return converted


def profile_of(image: Image.Image, what: str = "image") -> Profile | None:
    """Return the colour profile that an image holds; one that cannot be used is told about."""
    content = image.info.get("icc_profile")
    if not content or image.mode == "LAB":  # L*a*b* needs none
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(content))
        space = source.profile.xcolor_space.strip()
        if space not in _spaces(image.mode):
            warn_once(f"{what}: its colour profile, of {space} colours, does not fit and is left out")
            return None
        ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), {"GRAY": "L"}.get(space, space), "RGB"
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        warn_once(f"{what}: its colour profile is damaged and left out ({first_line(error)})")
        return None
    return Profile(content, space)


def _spaces(mode: str) -> tuple[str, ...]:
    """Return the kinds of profile that make sense for a mode."""
    if mode == "CMYK":
        return ("CMYK",)
    return ("GRAY", "RGB") if mode in GREY_MODES else ("RGB",)


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image of mode LAB (CIE L*a*b*, D50) to RGB in sRGB."""
    return _to_srgb(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))


def _to_srgb(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # it is None only where the image is changed in place
    return converted


def carried(image: Image.Image, what: str = "image") -> dict[str, Any]:
    """Return what goes along with the edit of an image, by the names of Pillow's ``info``.

    That is ``icc_profile``, where the edit's numbers mean colours by it, and ``dpi``; each if there is one.
    """
    profile, dpi = profile_of(image, what), _dpi(image.info.get("dpi"))
    found = {} if profile is None or profile.space != "RGB" else {"icc_profile": profile.content}
    return found if dpi is None else found | {"dpi": dpi}


def _dpi(value: Any) -> tuple[float, float] | None:
    try:
        across, down = (float(side) for side in value)
    except (TypeError, ValueError, ArithmeticError):
        return None
    usable = all(math.isfinite(side) and LEAST_DPI <= side <= MOST_DPI for side in (across, down))
    return (across, down) if usable else None
