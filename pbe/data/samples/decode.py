"""From encoded bytes to uint8 RGB, optionally at a half, a quarter or an eighth of the size.

Colours are converted to sRGB if an ICC profile says otherwise, and transparent parts are laid on white.
Images that cannot be used are reported with a reason.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps

from pbe.config import DataConfig
from pbe.data.samples.crops import Box
from pbe.data.shards.format import DamagedIndexError, digest as digest_of

# The reasons; indexes of latent caches hold them, too.
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
# Bytes without which a JPEG, PNG or WebP has no profile or no transparency: Pillow need not be asked.
PROFILE_MARKS, ALPHA_MARKS = (b"ICC_PROFILE", b"iCCP", b"ICCP"), (b"tRNS", b"ALPH", b"VP8L")
PNG_WITH_ALPHA = (b"\x04", b"\x06")  # its colour types
SAME = 2  # levels of 255 by which a profile may differ from sRGB and count as sRGB
T = TypeVar("T")


class UnusableImageError(Exception):
    """An image cannot be used; ``reason`` is one of this module's constants."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def unusable() -> Iterator[None]:
    """Turn what goes wrong while an image's index, annotation or bytes are read into UnusableImageError."""
    try:
        yield
    except DamagedIndexError as error:
        raise UnusableImageError(BAD_INDEX) from error
    except FileNotFoundError as error:
        raise UnusableImageError(MISSING_SHARD) from error
    except OSError as error:
        raise UnusableImageError(UNREADABLE) from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UnusableImageError(BAD_ANNOTATION) from error


def decode(encoded: bytes, flags: int) -> np.ndarray:
    """Decode an image as OpenCV's ``flags`` say; UnusableImageError where that cannot be done."""
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
    """Raise UnusableImageError where an image has another hash than the index says; many still decode."""
    if digest_of(encoded) != digest:
        raise UnusableImageError(DAMAGED)


def smallest_crop(frame: tuple[int, int], longer: float, shrink_fraction: float) -> float:
    """Return a length in pixels that no side of a crop falls below, given the least longer side of a box.

    A crop starts at the short side or more, and gives up ``shrink_fraction`` of the least margin on all
    sides of the extended box, which is at least as long as the box.
    """
    side = min(frame)
    return side - shrink_fraction * max(side - longer, 0.0)


def choose_reduction(encoded: bytes, frame: tuple[int, int], boxes: Sequence[Box], config: DataConfig) -> int:
    """Return the largest factor by which an image may be smaller when it is decoded: 1, 2, 4 or 8.

    It divides width and height of the frame, so that boxes scale exactly; no crop becomes smaller than the
    training image, and no longer side of a box, any of which may be drawn, shorter than the exemplar's. Only
    JPEGs decode faster when they are reduced.
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


def to_srgb(image: np.ndarray, encoded: bytes) -> np.ndarray:
    """Return a decoded image, uint8 ``h w 3`` RGB as the file holds it, in sRGB.

    One without a profile is returned as it is. So is one whose profile is sRGB's, damaged, or of another
    colour space than the pixels (CMYK).
    """
    if not any(mark in encoded for mark in PROFILE_MARKS):
        return image
    profile = _ask_pillow(encoded, lambda opened: opened.info.get("icc_profile"))
    return convert_profile(image, profile) if profile else image


def on_white(image: np.ndarray, encoded: bytes, *, turned: bool = True) -> np.ndarray:
    """Return a decoded image, uint8 ``h w 3``, with its transparent parts on white, as editing shows it.

    ``turned`` says whether the EXIF orientation has been applied to the image.
    """
    transparent = encoded[1:4] == b"PNG" and encoded[25:26] in PNG_WITH_ALPHA
    if not transparent and not any(mark in encoded for mark in ALPHA_MARKS):
        return image

    def read_alpha(opened: Image.Image) -> np.ndarray | None:
        if not opened.has_transparency_data:
            return None
        upright = ImageOps.exif_transpose(opened) if turned else opened
        return np.asarray(upright.convert("RGBA").getchannel("A"))

    alpha = _ask_pillow(encoded, read_alpha)
    if alpha is None or alpha.shape != image.shape[:2] or alpha.min(initial=255) == 255:
        return image
    share = alpha[..., None].astype(np.uint16)
    return ((image * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def _ask_pillow(encoded: bytes, question: Callable[[Image.Image], T]) -> T | None:
    """Return what Pillow answers of a file, or None where it cannot read the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP")) as opened:
                return question(opened)
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
