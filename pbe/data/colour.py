"""Colours as they are seen: in sRGB where an ICC profile says otherwise, and transparent parts on white."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps

MARKS = {b"\xff\xd8": b"ICC_PROFILE\0", b"\x89PNG": b"iCCP", b"RIFF": b"ICCP"}
SEARCHED = 1 << 18  # bytes in which a profile has to start
T = TypeVar("T")
SAME = 2  # levels of 255 by which a profile may differ from sRGB and count as sRGB


def to_srgb(image: np.ndarray, encoded: bytes) -> np.ndarray:
    """Return a decoded picture in sRGB.

    A file without a profile, or with one that means sRGB, costs a search in its first bytes and is returned
    as it is. So is one whose profile is damaged or of another colour space than the pixels (CMYK).

    Args:
        image: uint8 ``h w 3``, RGB as the file holds it.
        encoded: the file.
    """
    mark = next((mark for start, mark in MARKS.items() if encoded.startswith(start)), None)
    if mark is None or encoded.find(mark, 0, SEARCHED) < 0:
        return image
    profile = _ask_pillow(encoded, lambda picture: picture.info.get("icc_profile"))
    return convert_profile(image, profile) if profile else image


def on_white(image: np.ndarray, encoded: bytes, *, turned: bool = True) -> np.ndarray:
    """Return a decoded picture with its transparent parts on white, as editing shows it.

    A file that can hold no transparency costs a look at its header.

    Args:
        image: uint8 ``h w 3``, RGB without regard to transparency.
        encoded: the file.
        turned: whether the EXIF orientation has been applied to ``image``.
    """
    if not _may_be_transparent(encoded):
        return image

    def read_alpha(picture: Image.Image) -> np.ndarray:
        upright = ImageOps.exif_transpose(picture) if turned else picture
        return np.asarray(upright.convert("RGBA").getchannel("A"))

    alpha = _ask_pillow(encoded, read_alpha)
    if alpha is None or alpha.shape != image.shape[:2] or alpha.min(initial=255) == 255:
        return image
    share = alpha[..., None].astype(np.uint16)
    return ((image * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def _may_be_transparent(encoded: bytes) -> bool:
    if encoded.startswith(b"\x89PNG"):
        return encoded[25:26] in (b"\x04", b"\x06") or encoded.find(b"tRNS", 0, SEARCHED) >= 0
    if encoded[:4] == b"RIFF" and encoded[12:16] == b"VP8X":
        return bool(encoded[20] & 0x10)
    return encoded[:4] == b"RIFF" and encoded[12:16] == b"VP8L" and bool(encoded[24] & 0x10)


def _ask_pillow(encoded: bytes, question: Callable[[Image.Image], T]) -> T | None:
    """Return what Pillow answers of a file, or None where it cannot read the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded)) as picture:
                return question(picture)
    except Exception:  # its plugins raise whatever their parsers stumble over; OpenCV has read the pixels
        return None


def convert_profile(image: np.ndarray, profile: bytes) -> np.ndarray:
    """Return a picture, uint8 ``h w 3``, in sRGB; ``profile`` says what its numbers mean."""
    mode, transform = _transform(profile)
    if transform is None:
        return image
    if mode == "RGB":
        source = Image.fromarray(image)
    elif np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2]):
        source = Image.fromarray(image[..., 0])
    else:  # a grey profile in a coloured file
        return image
    return np.array(ImageCms.applyTransform(source, transform))


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode of a profile's colours and what converts them; None where there is nothing to do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L"}.get(source.profile.xcolor_space.strip(), "")
        if not mode:
            return mode, None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        steps = np.arange(0, 256, 17, dtype=np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(16, -1, 3)
        probe = Image.fromarray(grid if mode == "RGB" else steps[None])
        changed = np.asarray(ImageCms.applyTransform(probe, transform)).astype(np.int16)
        plain = grid if mode == "RGB" else np.stack([steps[None]] * 3, axis=-1)
        return mode, transform if np.abs(changed - plain).max() > SAME else None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return "", None
