"""Colours as they are seen: in sRGB where an ICC profile says otherwise, and transparent parts on white."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
PROFILE_FLAG, ALPHA_FLAG = 0x20, 0x10  # of a WebP with extensions
T = TypeVar("T")
SAME = 2  # levels of 255 by which a profile may differ from sRGB and count as sRGB


def to_srgb(image: np.ndarray, encoded: bytes) -> np.ndarray:
    """Return a decoded image in sRGB.

    A file without a profile costs a walk along its header, one with sRGB's a little more, and either is
    returned as it is. So is one whose profile is damaged or of another colour space than the pixels (CMYK).

    Args:
        image: uint8 ``h w 3``, RGB as the file holds it.
        encoded: the file.
    """
    if not _has_profile(encoded):
        return image
    profile = _ask_pillow(encoded, lambda image: image.info.get("icc_profile"))
    return convert_profile(image, profile) if profile else image


def on_white(image: np.ndarray, encoded: bytes, *, turned: bool = True) -> np.ndarray:
    """Return a decoded image with its transparent parts on white, as editing shows it.

    A file that can hold no transparency costs a look at its header.

    Args:
        image: uint8 ``h w 3``, RGB without regard to transparency.
        encoded: the file.
        turned: whether the EXIF orientation has been applied to ``image``.
    """
    if not _may_be_transparent(encoded):
        return image

    def read_alpha(image: Image.Image) -> np.ndarray:
        upright = ImageOps.exif_transpose(image) if turned else image
        return np.asarray(upright.convert("RGBA").getchannel("A"))

    alpha = _ask_pillow(encoded, read_alpha)
    if alpha is None or alpha.shape != image.shape[:2] or alpha.min(initial=255) == 255:
        return image
    share = alpha[..., None].astype(np.uint16)
    return ((image * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def _has_profile(encoded: bytes) -> bool:
    if encoded.startswith(JPEG):
        return _jpeg_has_profile(encoded)
    if encoded.startswith(PNG):
        return b"iCCP" in _png_chunks(encoded)
    if encoded[:4] != b"RIFF" or len(encoded) < 25:
        return False
    return encoded[12:16] == b"VP8X" and bool(encoded[20] & PROFILE_FLAG)


def _may_be_transparent(encoded: bytes) -> bool:
    if encoded.startswith(PNG):
        return encoded[25:26] in (b"\x04", b"\x06") or b"tRNS" in _png_chunks(encoded)
    if encoded[:4] != b"RIFF" or len(encoded) < 25:
        return False
    lossless = encoded[12:16] == b"VP8L" and bool(encoded[24] & 0x10)
    return lossless or (encoded[12:16] == b"VP8X" and bool(encoded[20] & ALPHA_FLAG))


def _jpeg_has_profile(encoded: bytes) -> bool:
    """Walk along the segments before the first scan."""
    place = 2
    while place + 4 <= len(encoded) and encoded[place] == 0xFF and encoded[place + 1] != 0xDA:
        if encoded[place + 1] == 0xFF:  # a filling byte
            place += 1
            continue
        if encoded[place + 1] == 0xE2 and encoded.startswith(b"ICC_PROFILE\0", place + 4):
            return True
        place += 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
    return False


def _png_chunks(encoded: bytes) -> set[bytes]:
    """Return the kinds of the chunks before the pixels."""
    kinds: set[bytes] = set()
    place = len(PNG)
    while place + 8 <= len(encoded) and encoded[place + 4 : place + 8] != b"IDAT":
        kinds.add(encoded[place + 4 : place + 8])
        place += 12 + int.from_bytes(encoded[place : place + 4], "big")
    return kinds


def _ask_pillow(encoded: bytes, question: Callable[[Image.Image], T]) -> T | None:
    """Return what Pillow answers of a file, or None where it cannot read the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded)) as image:
                return question(image)
    except Exception:  # its plugins raise whatever their parsers stumble over; OpenCV has read the pixels
        return None


def convert_profile(image: np.ndarray, profile: bytes) -> np.ndarray:
    """Return an image, uint8 ``h w 3``, in sRGB; ``profile`` says what its numbers mean."""
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
