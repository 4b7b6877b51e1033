"""Pictures and masks of every kind, brought to two plain forms.

A picture is ``h w 3``, RGB, uint8 or (from floating-point input) float32 in [-1, 1]; a mask is bool ``h w``,
True = repaint. No torch here: command lines check their files before they load it.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pbe.editing.problems import EditTypeError, EditValueError

HOLE_FROM = 128  # a grey value of 128 and above is a hole, the original's rounding of value / 255 >= 0.5
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
DEEP_STEP = 65535 // 255


@dataclass(frozen=True)
class LoadedFile:
    """A file that was read.

    Attributes:
        pixels: the picture (uint8 ``h w 3``) or the mask (bool ``h w``, True = repaint).
        sha256: of the file's bytes, in hexadecimal.
    """

    pixels: np.ndarray
    sha256: str


def read_picture(path: str | Path, what: str = "image") -> LoadedFile:
    """Read a picture file: upright by its EXIF tag, 8 bits, RGB, transparent parts on white, first frame.

    Args:
        path: the file.
        what: how an error calls it.

    Raises:
        EditValueError: the file is missing, empty, damaged or not a picture.
    """
    image, digest = _open(Path(path), what)
    return LoadedFile(_named(picture_from_image, image, path, what), digest)


def read_mask(path: str | Path) -> LoadedFile:
    """Read a mask file: a grey value of 128 or more means repaint; see :func:`mask_from_image`.

    Raises:
        EditValueError: the file is missing, empty, damaged, not a picture, or has no hole.
    """
    image, digest = _open(Path(path), "mask")
    hole = _named(mask_from_image, image, path, "mask")
    require_hole(hole, f"mask '{path}'")
    return LoadedFile(hole, digest)


def _open(path: Path, what: str) -> tuple[Image.Image, str]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise EditValueError(f"{what} '{path}' does not exist") from error
    except OSError as error:
        raise EditValueError(f"{what} '{path}' cannot be read: {error.strerror}") from error
    if not content:
        raise EditValueError(f"{what} '{path}' is an empty file")
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return ImageOps.exif_transpose(image), hashlib.sha256(content).hexdigest()
    except UnidentifiedImageError as error:
        raise EditValueError(f"{what} '{path}' is not a picture of a known format") from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise EditValueError(f"{what} '{path}' is damaged or cannot be decoded: {error}") from error


def _named(convert: Any, image: Image.Image, path: str | Path, what: str) -> np.ndarray:
    try:
        return convert(image)
    except EditValueError as error:
        raise EditValueError(f"{what} '{path}': {error}") from error


def picture_from_image(image: Image.Image) -> np.ndarray:
    """Return uint8 ``h w 3`` of a Pillow image of any mode; transparent parts are laid on white.

    16-bit values are divided by 257. The EXIF orientation is left to :func:`read_picture`.

    Raises:
        EditValueError: the image has no pixels, or its mode has no meaning as a picture.
    """
    _require_pixels(image.size)
    image = _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def mask_from_image(image: Image.Image) -> np.ndarray:
    """Return bool ``h w``, True = repaint, of a Pillow image of any mode.

    The alpha channel is the mask when any of it is less than opaque, the luminance otherwise.

    Raises:
        EditValueError: as for :func:`picture_from_image`.
    """
    _require_pixels(image.size)
    image = _eight_bits(image)
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min() < 255:
            return alpha >= HOLE_FROM
        image = image.convert("RGB")
    return np.asarray(image.convert("L")) >= HOLE_FROM


def _require_pixels(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise EditValueError(f"a picture of {size[0]}x{size[1]} pixels has nothing to edit")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Bring 16-bit greys to 8 bits (Pillow's own conversion would clip them) and refuse odd modes."""
    if image.mode in DEEP_MODES:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise EditValueError("grey values beyond 16 bits; save it with 8 or 16 bits per channel")
        return Image.fromarray(((values + DEEP_STEP // 2) // DEEP_STEP).astype(np.uint8))
    if image.mode in ("F", "LAB", "La"):
        raise EditValueError(f"colour mode {image.mode} is not supported; save it as 8-bit RGB")
    return image


def as_picture(value: Any, what: str = "image") -> np.ndarray:
    """Return ``h w 3`` of a Pillow image or of an array ``h w``, ``h w 1``, ``h w 3`` or ``h w 4``.

    An array is uint8, or floating point in [0, 1]. The latter gives float32 in [-1, 1], the rest uint8.

    Raises:
        EditTypeError: anything else.
        EditValueError: an array of another shape or beyond its range, or a picture without pixels.
    """
    if isinstance(value, np.ndarray):
        if np.issubdtype(value.dtype, np.floating):
            return _float_picture(_plain(value, what, channels=(1, 3, 4)), what)
        if value.dtype != np.uint8:
            raise EditTypeError(f"{what}: an array of {value.dtype}; it must be uint8, or float in [0, 1]")
        value = Image.fromarray(np.ascontiguousarray(_plain(value, what, channels=(1, 3, 4))))
    if not isinstance(value, Image.Image):
        expected = "a PIL image, a numpy array or a torch tensor"
        raise EditTypeError(f"{what}: {type(value).__name__}; it must be {expected}, or a list of these")
    return picture_from_image(value)


def _float_picture(values: np.ndarray, what: str) -> np.ndarray:
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise EditValueError(f"{what}: a floating-point array must lie in [0, 1]")
    colours = values[:, :, None] if values.ndim == 2 else values
    if colours.shape[2] == 4:  # laid on white, like every transparent picture
        alpha = colours[:, :, 3:]
        colours = colours[:, :, :3] * alpha + (1.0 - alpha)
    return np.broadcast_to(colours * 2.0 - 1.0, (*values.shape[:2], 3)).astype(np.float32)


def as_mask(value: Any, what: str = "mask_image", half_is_hole: bool = True) -> np.ndarray:
    """Return bool ``h w``, True = repaint, of a Pillow image or an array ``h w`` or ``h w 1``.

    An array is bool, uint8 (128 and above repaints) or floating point in [0, 1] (above 0.5 repaints).

    Args:
        value: the mask.
        what: how an error calls it.
        half_is_hole: whether a floating-point value of exactly 0.5 repaints.

    Raises:
        EditTypeError: anything else.
        EditValueError: another shape, values outside [0, 1], or no hole.
    """
    if isinstance(value, np.ndarray):
        hole = _hole(_plain(value, what, channels=(1,)), what, half_is_hole)
    elif isinstance(value, Image.Image):
        hole = mask_from_image(value)
    else:
        expected = "a PIL image, a numpy array or a torch tensor"
        raise EditTypeError(f"{what}: {type(value).__name__}; it must be {expected}, or a list of these")
    require_hole(hole, what)
    return hole


def _hole(values: np.ndarray, what: str, half_is_hole: bool) -> np.ndarray:
    if values.dtype == np.uint8:
        return values >= HOLE_FROM
    if values.dtype == bool:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise EditTypeError(f"{what}: an array of {values.dtype}; it must be bool, uint8 or float")
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise EditValueError(f"{what}: a floating-point mask must lie in [0, 1]")
    return values >= 0.5 if half_is_hole else values > 0.5


def _plain(values: np.ndarray, what: str, channels: tuple[int, ...]) -> np.ndarray:
    """Return an array ``h w`` or ``h w c`` with pixels and one of these numbers of channels."""
    plain = values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if plain.ndim == 2 or (plain.ndim == 3 and plain.shape[2] in channels):
        _require_pixels((plain.shape[1], plain.shape[0]))
        return plain
    forms = " or ".join(["(h, w)"] + [f"(h, w, {count})" for count in channels])
    raise EditValueError(f"{what}: an array of shape {values.shape}; it must be {forms}")


def require_hole(hole: np.ndarray, what: str) -> None:
    """Refuse a mask without a single pixel to repaint.

    Raises:
        EditValueError: no pixel of ``hole`` (bool ``h w``) is True.
    """
    if not hole.any():
        advice = f"paint what is to be replaced white (a grey value from {HOLE_FROM} to 255)"
        raise EditValueError(f"{what} has no hole: {advice}")


def fit_mask(hole: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask, bool ``h w``, to ``size`` (height, width) by nearest neighbour.

    Raises:
        EditValueError: the hole is so thin that nothing of it is left.
    """
    if hole.shape == size:
        return hole
    resized = Image.fromarray(hole.astype(np.uint8) * 255).resize(size[::-1], Image.Resampling.NEAREST)
    fitted = np.asarray(resized) >= HOLE_FROM
    require_hole(fitted, f"the mask, resized from {_by(hole.shape)} to the picture's {_by(size)} pixels,")
    return fitted


def _by(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"
