"""Images and masks of every kind, brought to two plain forms.

An image is ``h w 3``, RGB, uint8 or (from floating-point input) float32 in [-1, 1]; a mask is bool ``h w``,
True = repaint. No torch here: command lines check their files before they load it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from pbe.editing.image_files import carried, decode_image, lab_to_srgb, needed_turn, profile_of
from pbe.errors import EditTypeError, EditValueError, first_line, warn_once
from pbe.mask_reading import BY_LUMINANCE, MASK_FROM, UnclearMaskError, read_mask_image

DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
DEEP_STEP = 65535 // 255
OTHER_ASPECT = 0.01  # a mask's side may differ by this share, and a pixel, from that of the image's aspect
PAINT_WHITE = f"paint what is to be replaced white (a grey value from {MASK_FROM} to 255)"
EXPECTED = "a PIL image, a numpy array or a torch tensor"
T = TypeVar("T")


@dataclass(frozen=True)
class LoadedFile:
    """A file that was read.

    Attributes:
        pixels: the image (uint8 ``h w 3``) or the mask (bool ``h w``, True = repaint).
        sha256: of the file's bytes, in hexadecimal.
        carried: of an image to edit: what goes along with the edit, see :func:`image_files.carried`.
        read_by: of a mask: what decided, see :func:`pbe.mask_reading.read_mask_image`.
    """

    pixels: np.ndarray
    sha256: str
    carried: dict[str, Any] = field(default_factory=dict)
    read_by: str = ""


def read_image(path: str | Path, what: str = "image") -> LoadedFile:
    """Read an image file: upright by its EXIF tag, 8 bits, RGB, transparent parts on white, first frame.

    The colours of what is called an ``image`` stay numbers of its own colour profile, which goes along with
    the edit; those of anything else are brought to sRGB.
    """
    image, digest = _open(Path(path), what)
    named, own = f"{what} '{path}'", what == "image"
    pixels = _named(lambda: pixels_of(image, named, own_profile=own), named)
    return LoadedFile(pixels, digest, carried(image, named) if own else {})


def read_mask(path: str | Path) -> LoadedFile:
    """Read a mask file; see :func:`pbe.mask_reading.read_mask_image` for what a mask may look like."""
    image, digest = _open(Path(path), "mask")
    named = f"mask '{path}'"
    mask, read_by = _named(lambda: mask_from_image(image), named)
    require_masked(mask, named)
    return LoadedFile(mask, digest, read_by=read_by)


def _open(path: Path, what: str) -> tuple[Image.Image, str]:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise EditValueError(f"{what} '{path}' is not a regular file")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise EditValueError(f"{what} '{path}' does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: no system has such a path
        reason = getattr(error, "strerror", None) or first_line(error)
        reason = "it is a folder; name a file in it" if isinstance(error, IsADirectoryError) else reason
        raise EditValueError(f"{what} '{path}' cannot be read: {reason}") from error
    try:
        return decode_image(content), hashlib.sha256(content).hexdigest()
    except EditValueError as error:
        raise EditValueError(f"{what} '{path}' {error}") from error


def _named(convert: Callable[[], T], named: str) -> T:
    try:
        return convert()
    except EditValueError as error:
        raise EditValueError(f"{named}: {error}") from error


def pixels_of(image: Image.Image, what: str = "image", *, own_profile: bool = False) -> np.ndarray:
    """Return uint8 ``h w 3`` of a Pillow image of any mode but floating point.

    Transparent parts are laid on white. Greys of 16 bits are divided by 257. The EXIF orientation is left to
    :func:`read_image`. With ``own_profile`` colours stay numbers of the image's own RGB profile, where it has
    one; else they are converted to sRGB. Profiles of grey, CMYK and L*a*b* are always converted.
    """
    _require_pixels(image.size)
    profile = profile_of(image, what)
    try:
        flat = _flat(image, what)
        if profile is None or (own_profile and profile.space == "RGB"):
            return np.array(flat)
        if profile.space == "CMYK":
            return np.array(profile.to_srgb(image))
        return np.array(profile.to_srgb(flat.getchannel(0) if profile.space == "GRAY" else flat))
    except EditValueError:
        raise
    except Exception as error:  # a file that is decoded only now, or is closed, fails in any way
        raise EditValueError(f"the image is damaged or cannot be decoded: {first_line(error)}") from error


def _flat(image: Image.Image, what: str) -> Image.Image:
    """Return an image in RGB, 8 bits, with transparent parts on white; colour profiles are left aside."""
    if image.mode == "LAB":
        return lab_to_srgb(image)
    if image.mode in DEEP_MODES:
        return _eight_bits(image, what).convert("RGB")
    if image.mode == "F":
        raise EditValueError("colour mode F is not supported; save it as 8-bit RGB")
    if image.mode == "La":  # grey multiplied by alpha, which Pillow converts to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def mask_from_image(image: Image.Image) -> tuple[np.ndarray, str]:
    """Return bool ``h w``, True = repaint, of a Pillow image of any mode, and what decided."""
    try:
        image.load()
        mask, read_by = read_mask_image(image)
    except UnclearMaskError as error:
        raise EditValueError(f"{error}; {PAINT_WHITE}") from error
    except Exception as error:  # as in pixels_of
        raise EditValueError(f"the mask is damaged or cannot be decoded: {first_line(error)}") from error
    return mask > 0, read_by


def _require_pixels(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise EditValueError(f"an image of {size[0]}x{size[1]} pixels has nothing to edit")


def _eight_bits(image: Image.Image, what: str) -> Image.Image:
    """Bring greys of 16 bits to 8 bits, which Pillow's own conversion would clip."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise EditValueError("grey values beyond 16 bits; save it with 8 or 16 bits per channel")
    clear = image.info.get("transparency", -1)
    deep = values.max() > 255
    if not deep and values.any():
        warn_once(f"{what}: none of its 16-bit greys is above 255; they are taken as greys of 8 bits")
    greys = (values + DEEP_STEP // 2) // DEEP_STEP if deep else values
    return Image.fromarray(np.where(values == clear, 255, greys).astype(np.uint8))


def as_image(value: Any, what: str = "image", *, own_profile: bool = False) -> np.ndarray:
    """Return ``h w 3`` of a Pillow image or of an array ``h w``, ``h w 1``, ``h w 3`` or ``h w 4``.

    An array is uint8, or floating point in [0, 1]. The latter gives float32 in [-1, 1], the rest uint8. For
    ``own_profile`` see :func:`pixels_of`.
    """
    if isinstance(value, np.ndarray):
        if np.issubdtype(value.dtype, np.floating):
            return _float_image(_plain(value, what, channels=(1, 3, 4)), what)
        if value.dtype != np.uint8:
            raise EditTypeError(f"{what}: an array of {value.dtype}; it must be uint8, or float in [0, 1]")
        plain = np.ascontiguousarray(_plain(value, what, channels=(1, 3, 4)))
        if plain.max() == 1:
            warn_once(f"{what}: a uint8 array whose largest value is 1 is nearly black; white is 255")
        value = Image.fromarray(plain)
    if not isinstance(value, Image.Image):
        raise EditTypeError(f"{what}: {type(value).__name__}; it must be {EXPECTED}, or a list of these")
    _tell_turn(value, what)
    return _named(lambda: pixels_of(value, what, own_profile=own_profile), what)


def _float_image(values: np.ndarray, what: str) -> np.ndarray:
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise EditValueError(f"{what}: a floating-point array must lie in [0, 1]")
    colours = values[:, :, None] if values.ndim == 2 else values
    if colours.shape[2] == 4:  # laid on white, like every transparent image
        alpha = colours[:, :, 3:]
        colours = colours[:, :, :3] * alpha + (1.0 - alpha)
    return np.broadcast_to(colours * 2.0 - 1.0, (*values.shape[:2], 3)).astype(np.float32)


def as_mask(value: Any, what: str = "mask_image", half_is_masked: bool = True) -> np.ndarray:
    """Return bool ``h w``, True = repaint, of a Pillow image or an array ``h w`` or ``h w 1``.

    An array is bool, uint8, which is read as an image of these greys, or floating point in [0, 1] (above 0.5
    repaints, and with ``half_is_masked`` 0.5 too). What else than luminance decided is told.
    """
    if isinstance(value, np.ndarray):
        mask = _mask_of_array(_plain(value, what, channels=(1,)), what, half_is_masked)
    elif isinstance(value, Image.Image):
        _tell_turn(value, what)
        mask = _told_mask(value, what)
    else:
        raise EditTypeError(f"{what}: {type(value).__name__}; it must be {EXPECTED}, or a list of these")
    require_masked(mask, what)
    return mask


def _mask_of_array(values: np.ndarray, what: str, half_is_masked: bool) -> np.ndarray:
    if values.dtype == np.uint8:
        return _told_mask(Image.fromarray(np.ascontiguousarray(values)), what)
    if values.dtype == bool:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise EditTypeError(f"{what}: an array of {values.dtype}; it must be bool, uint8 or float")
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise EditValueError(f"{what}: a floating-point mask must lie in [0, 1]")
    return values >= 0.5 if half_is_masked else values > 0.5


def _tell_turn(image: Image.Image, what: str) -> None:
    if needed_turn(image) is not None:
        warn_once(
            f"{what}: its EXIF orientation is not applied; PIL.ImageOps.exif_transpose turns it upright"
        )


def _told_mask(image: Image.Image, what: str) -> np.ndarray:
    mask, read_by = _named(lambda: mask_from_image(image), what)
    if read_by != BY_LUMINANCE and mask.any():
        warn_once(f"{what}: {decision(mask, read_by)}")
    return mask


def decision(mask: np.ndarray, read_by: str) -> str:
    """Return in words what decided where a mask, bool ``h w``, repaints, and how much that is."""
    return f"read by {read_by}, it repaints {mask.mean():.1%} of the image"


def _plain(values: np.ndarray, what: str, channels: tuple[int, ...]) -> np.ndarray:
    """Return an array ``h w`` or ``h w c`` with pixels and one of these numbers of channels."""
    plain = values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if plain.ndim == 2 or (plain.ndim == 3 and plain.shape[2] in channels):
        _require_pixels((plain.shape[1], plain.shape[0]))
        return plain
    forms = " or ".join(["(h, w)"] + [f"(h, w, {count})" for count in channels])
    raise EditValueError(f"{what}: an array of shape {values.shape}; it must be {forms}")


def require_masked(mask: np.ndarray, what: str) -> None:
    """Refuse a mask without a single pixel to repaint."""
    if not mask.any():
        raise EditValueError(f"{what} has no masked region: {PAINT_WHITE}")


def fit_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask, bool ``h w``, to ``size`` (height, width) by nearest neighbour."""
    if mask.shape == size:
        return mask
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(size[::-1], Image.Resampling.NEAREST)
    fitted = np.asarray(resized) > 0
    require_masked(fitted, f"the mask, resized from {_by(mask.shape)} to the image's {_by(size)} pixels,")
    return fitted


def aspect_remark(mask: tuple[int, ...], size: tuple[int, ...]) -> str | None:
    """Return a remark where a mask (height, width) is stretched to fit an image; None where aspects agree."""
    expected = mask[1] * size[0] / size[1]
    if abs(mask[0] - expected) <= 1 + OTHER_ASPECT * max(mask[0], expected):
        return None
    turned = "; is one of them turned?" if mask[::-1] == size else ""
    return f"it is {_by(mask)}, the image {_by(size)}: stretched to fit{turned}"


def _by(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"


GREY = np.uint8(128)


def to_unit(image: np.ndarray) -> np.ndarray:
    """Return float32 in [0, 1] of an image that is uint8 or float32 in [-1, 1]."""
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255.0)
    return image / np.float32(2.0) + np.float32(0.5)


def composite(source: np.ndarray, edit: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the edit inside the mask (bool ``h w``) and the source everywhere else, with a hard seam.

    The source is ``h w 3``, uint8 or float32 in [-1, 1], the edit and the result float32 in [0, 1]; outside
    the mask :func:`to_bytes` gives back a uint8 source's very bytes.
    """
    return np.where(mask[:, :, None], edit, to_unit(source))


def grey_out(source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an image (uint8 ``h w 3``) with its mask (bool ``h w``) at mid-grey, to be looked at."""
    return np.where(mask[:, :, None], GREY, source)


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Round a float image in [0, 1] to uint8 of the same shape."""
    return np.round(image * np.float32(255.0)).astype(np.uint8)
