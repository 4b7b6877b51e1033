"""From pictures and masks to what the networks take: sizes, padding, and the mask at latent size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pbe.editing.problems import EditTypeError, EditValueError
from pbe.models.latent_diffusion import latent_mask

Size = tuple[int, int]  # height, width
MOST = 2**31 - 1  # of any count; libraries below this one overflow beyond it


def working_size(size: Size, image_size: int, largest_side: int = 0) -> Size:
    """Return the (height, width) at which a whole picture is edited.

    A picture of at most ``(2 image_size)^2`` pixels is edited as it is. A larger one is reduced until its
    short side is ``image_size``, and further where it would still have more pixels than that.

    Args:
        size: height and width of the picture.
        image_size: the model's training resolution.
        largest_side: pictures of at most the square of this many pixels are edited as they are, too.
    """
    limit = (2 * image_size) ** 2
    pixels, scale = size[0] * size[1], 1.0
    if pixels > max(limit, largest_side**2):
        scale = min(image_size / min(size), math.sqrt(limit / pixels), 1.0)
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def check_count(name: str, value: object, kind: type[EditTypeError | EditValueError] = EditTypeError) -> int:
    """Return a setting that is a whole number from 1 up, of whatever numeric type, as an int.

    Args:
        name: what errors call it.
        value: the setting: an int, or a float or numpy scalar without a fraction.
        kind: error for anything that is no whole number.

    Raises:
        EditTypeError: it is no whole number; ``kind`` in its place.
        EditValueError: it is below 1, or absurdly large.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise kind(f"{name}: {type(value).__name__}; it must be an int")
    number = int(value) if isinstance(value, Integral) else check_number(name, value)
    if number < 1 or not math.isfinite(number):
        raise EditValueError(f"{name} is {value}; it must be at least 1")
    if number > MOST:
        raise EditValueError(f"{name} is too large: {value}; it must be at most {MOST}")
    if number != int(number):
        raise kind(f"{name} is {value}; it must be a whole number")
    return int(number)


def check_number(name: str, value: object) -> float:
    """Return a setting that is a number of any numeric type, numpy's among them, as a float.

    Raises:
        EditTypeError: it is none.
        EditValueError: it is beyond the floats.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise EditTypeError(f"{name}: {type(value).__name__}; it must be a number")
    try:
        return float(value)
    except OverflowError as error:
        raise EditValueError(f"{name} is too large a number") from error


def resize_picture(picture: np.ndarray, size: Size) -> np.ndarray:
    """Resize ``h w 3``, uint8 or float32, to (height, width), bicubic and antialiased; the type stays."""
    if picture.shape[:2] == size:
        return picture
    if picture.dtype == np.uint8:
        return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))
    channels = [Image.fromarray(picture[:, :, index]) for index in range(3)]
    resized = [channel.resize(size[::-1], Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=2).clip(-1.0, 1.0)


def reduce_mask(hole: np.ndarray, size: Size) -> np.ndarray:
    """Resize a mask, bool ``h w``; a pixel that any part of the hole touches is a hole.

    So nothing of what is to be replaced stays visible at the border of a reduced hole.
    """
    if hole.shape == size:
        return hole
    cover = Image.fromarray(hole.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX)
    return np.asarray(cover) > 0.0


def pad_to_multiple(array: np.ndarray, multiple: int) -> np.ndarray:
    """Pad ``h w ...`` at the bottom and right to multiples of ``multiple``.

    A side is reflected where it is longer than its padding, otherwise its last row or column is repeated.
    """
    rows, columns = (-side % multiple for side in array.shape[:2])
    return pad(array, ((0, rows), (0, columns)))


def pad(array: np.ndarray, pads: Sequence[tuple[int, int]]) -> np.ndarray:
    """Pad ``h w ...`` by (before, after) rows and columns, filled as :func:`pad_to_multiple` says."""
    for axis, (before, after) in enumerate(pads):
        if not before + after:
            continue
        both = [(0, 0)] * array.ndim
        both[axis] = (before, after)
        array = np.pad(array, both, mode="reflect" if max(before, after) < array.shape[axis] else "edge")
    return array


def network_inputs(
    pictures: Sequence[np.ndarray], holes: Sequence[np.ndarray], size: Size, multiple: int
) -> tuple[Tensor, Tensor]:
    """Resize, pad and stack pictures and masks.

    Args:
        pictures: ``h w 3`` each, uint8 or float32 in [-1, 1].
        holes: bool ``h w`` each.
        size: the working size.
        multiple: the padded sides are multiples of this.

    Returns:
        Images ``(b, 3, H, W)`` float32 in [-1, 1] and keep masks ``(b, 1, H, W)`` float32, 1 = keep.
    """
    padded = [to_signed(pad_to_multiple(resize_picture(picture, size), multiple)) for picture in pictures]
    images = rearrange(torch.from_numpy(np.stack(padded)), "b h w c -> b c h w").contiguous()
    keep = [~pad_to_multiple(reduce_mask(hole, size), multiple) for hole in holes]
    return images, torch.from_numpy(np.stack(keep)).float()[:, None]


def to_signed(picture: np.ndarray) -> np.ndarray:
    """Return float32 in [-1, 1] of a picture that is uint8 or that already."""
    if picture.dtype != np.uint8:
        return picture
    return picture.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def mask_at_latent_size(keep: Tensor, size: Size, mode: str) -> Tensor:
    """Resize keep masks ``(b, 1, H, W)`` to latent size without antialias.

    Args:
        keep: 1 = keep.
        size: of the latents.
        mode: ``bilinear``, as the original does, or ``nearest``, as diffusers does (the top left pixel of
            each block).
    """
    return F.interpolate(keep, size=size, mode="nearest") if mode == "nearest" else latent_mask(keep, size)
