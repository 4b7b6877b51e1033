"""From images, masks and exemplars to what the networks take: sizes, padding, masks at latent size, crops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pbe.config import ExemplarEncoderConfig
from pbe.editing.images import to_bytes, to_unit
from pbe.errors import EditTypeError, EditValueError, UserError
from pbe.models.image_tower import follow_tower
from pbe.models.latent_diffusion import latent_mask

Size = tuple[int, int]  # height, width


def working_size(size: Size, image_size: int, largest_side: int = 0) -> Size:
    """Return the (height, width) at which a whole image is edited.

    An image of at most ``(2 image_size)^2`` pixels, where ``image_size`` is the model's training resolution,
    is edited as it is, and so is one of at most ``largest_side^2``. A larger one is reduced until its short
    side is ``image_size``, and further where it would still have more pixels than that.
    """
    limit = (2 * image_size) ** 2
    pixels, scale = size[0] * size[1], 1.0
    if pixels > max(limit, largest_side**2):
        scale = min(image_size / min(size), math.sqrt(limit / pixels), 1.0)
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize ``h w 3``, uint8 or float32, to (height, width), bicubic and antialiased; the type stays."""
    if image.shape[:2] == size:
        return image
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    channels = [Image.fromarray(image[:, :, index]) for index in range(3)]
    resized = [channel.resize(size[::-1], Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=2).clip(-1.0, 1.0)


def reduce_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """Resize a mask, bool ``h w``; pixels that it touches anywhere are in it, so that no border stays."""
    if mask.shape == size:
        return mask
    cover = Image.fromarray(mask.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX)
    return np.asarray(cover) > 0.0


def pad_to_multiple(array: np.ndarray, multiple: int) -> np.ndarray:
    """Pad ``h w ...`` at the bottom and right to multiples of ``multiple``."""
    rows, columns = (-side % multiple for side in array.shape[:2])
    return pad(array, ((0, rows), (0, columns)))


def pad(array: np.ndarray, pads: Sequence[tuple[int, int]]) -> np.ndarray:
    """Pad ``h w ...`` by (before, after) rows and columns.

    A side is reflected where it is longer than its padding, otherwise its last row or column is repeated.
    """
    for axis, (before, after) in enumerate(pads):
        if not before + after:
            continue
        both = [(0, 0)] * array.ndim
        both[axis] = (before, after)
        array = np.pad(array, both, mode="reflect" if max(before, after) < array.shape[axis] else "edge")
    return array


def network_inputs(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], size: Size, multiple: int
) -> tuple[Tensor, Tensor]:
    """Resize images and masks to the working size, pad them to multiples of ``multiple``, and stack them.

    Images are ``h w 3``, uint8 or float32 in [-1, 1], masks bool ``h w``. Returns images ``(b, 3, H, W)``
    float32 in [-1, 1] and keep masks ``(b, 1, H, W)`` float32, 1 = keep.
    """
    padded = [to_signed(pad_to_multiple(resize_image(image, size), multiple)) for image in images]
    stacked = rearrange(torch.from_numpy(np.stack(padded)), "b h w c -> b c h w").contiguous()
    keep = [~pad_to_multiple(reduce_mask(mask, size), multiple) for mask in masks]
    return stacked, torch.from_numpy(np.stack(keep)).float()[:, None]


def to_signed(image: np.ndarray) -> np.ndarray:
    """Return float32 in [-1, 1] of an image that is uint8 or that already."""
    if image.dtype != np.uint8:
        return image
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def mask_at_latent_size(keep: Tensor, size: Size, mode: str) -> Tensor:
    """Resize keep masks ``(b, 1, H, W)`` to latent size without antialias.

    ``mode`` is ``bilinear``, as in the original, or ``nearest``, as in diffusers (top left pixel of each
    block).
    """
    return F.interpolate(keep, size=size, mode="nearest") if mode == "nearest" else latent_mask(keep, size)


Exemplar = np.ndarray | Tensor  # an image, or pixels normalised for the tower
BICUBIC = 3
FILTERS = {2: "bilinear", BICUBIC: "bicubic"}  # Pillow's numbers, which preprocessor_config.json holds
SOURCE = "preprocessor_config.json"
RESCALE = 1 / 255  # of a byte
ALWAYS = ("do_center_crop", "do_rescale", "do_normalize")  # steps that cannot be left out here


@dataclass(frozen=True)
class CropSettings:
    """How CLIP's processor brings an exemplar to the tower: the fields of ``preprocessor_config.json``.

    Attributes:
        shortest_edge: length that the shorter side is resized to; 0 leaves the size.
        crop: side of the square taken from the centre.
        resample: ``bilinear`` or ``bicubic``, antialiased.
        mean: of the tower's pixels, by channel.
        std: likewise.
    """

    shortest_edge: int
    crop: int
    resample: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def crop_settings(config: ExemplarEncoderConfig, preprocessor: dict[str, Any] | None = None) -> CropSettings:
    """Return the settings of a ``preprocessor_config.json`` of any age; the tower has what it leaves open.

    A crop of another size than the tower's is an error, and so is a step that is switched off.
    """
    found, config = preprocessor or {}, replace(config)
    follow_tower(config)  # what it leaves open is the tower's own
    size = config.image_size
    filter_number = found.get("resample", BICUBIC)
    if filter_number not in tuple(FILTERS):
        raise UserError(f"{SOURCE}: resample {filter_number} is not supported; it must be 2 or 3")
    for key in ALWAYS:
        if not found.get(key, True):
            raise UserError(f"{SOURCE}: {key} is {found[key]!r}, which is not supported (only true)")
    factor = found.get("rescale_factor", RESCALE)
    if not _is_real(factor) or not math.isclose(factor, RESCALE, rel_tol=1e-5):
        raise UserError(f"{SOURCE}: rescale_factor is {factor!r}, which is not supported (only 1/255)")
    crop = _side(found.get("crop_size", size), "crop_size")
    if crop != size:
        raise UserError(f"{SOURCE}: crop_size is {crop}, but the image tower takes {size} px")
    return CropSettings(
        shortest_edge=_side(found.get("size", size), "size") if found.get("do_resize", True) else 0,
        crop=crop,
        resample=FILTERS[filter_number],
        mean=_by_channel(found.get("image_mean", config.mean), "image_mean"),
        std=_by_channel(found.get("image_std", config.std), "image_std", above=0.0),
    )


def _by_channel(value: Any, key: str, above: float = -math.inf) -> tuple[float, ...]:
    """Return a number for each of three channels, all of them larger than ``above``."""
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    if len(numbers) != 3 or not all(_is_real(each) and above < each < math.inf for each in numbers):
        kind = "numbers above 0" if above == 0.0 else "numbers"
        raise UserError(f"{SOURCE}: {key} is {value!r}; it must be three {kind}")
    return numbers


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _side(value: Any, key: str) -> int:
    """Return the length that a size of the file stands for: a number, a shortest edge, or a square."""
    if isinstance(value, dict):
        first, *others = [*value.values()] or [None]
        value = first if all(side == first for side in others) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{SOURCE}: {key} must be one length in pixels")
    return value


def clip_crop(
    image: np.ndarray, size: int, shortest_edge: int | None = None, resample: str = "bicubic"
) -> np.ndarray:
    """Resize the shorter side and cut the square out of the centre, as CLIP's image processor does.

    The numbers are those of torchvision's uint8 resize, which the processor uses.

    Args:
        image: uint8 ``h w 3``, and so is the result.
        size: side of the square; where the image is smaller the rest is black.
        shortest_edge: length for the shorter side; None means ``size``, 0 leaves the size.
        resample: ``bicubic`` or ``bilinear``, antialiased.
    """
    height, width = image.shape[:2]
    edge = (size if shortest_edge is None else shortest_edge) or min(height, width)
    short = min(height, width)
    resized = tuple(max(1, edge if side == short else int(edge * side / short)) for side in (height, width))
    pixels = rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w")
    if resized != (height, width):
        pixels = F.interpolate(pixels, resized, mode=resample, antialias=True)
    missing = [max(size - side, 0) for side in resized]
    (top, left), (bottom, right) = ([m // 2 for m in missing], [(m + 1) // 2 for m in missing])
    pixels = F.pad(pixels, (left, right, top, bottom))
    start = [int((side - size) / 2) if side > size else 0 for side in resized]
    square = pixels[0, :, start[0] : start[0] + size, start[1] : start[1] + size]
    return rearrange(square, "c h w -> h w c").numpy()


def exemplar_pixels(
    exemplars: Sequence[Exemplar], config: ExemplarEncoderConfig, settings: CropSettings | None
) -> Tensor:
    """Return what the tower takes, ``(b, 3, s, s)`` float32, normalised.

    Images (``h w 3``, uint8 or float32 in [-1, 1]) are cropped as ``settings`` say, or squashed whole,
    bicubic, as the original does it, where these are None; tensors are normalised for the tower already.
    """
    size, ready = config.image_size, []
    for exemplar in exemplars:
        if isinstance(exemplar, Tensor):
            if tuple(exemplar.shape) != (3, size, size):
                raise EditValueError(
                    "example_image: a float tensor is taken as pixels normalised for the image tower and "
                    f"must be (3, {size}, {size}) or (b, 3, {size}, {size}), not {tuple(exemplar.shape)}"
                )
            ready.append(exemplar.float().cpu())
        elif settings is None:
            ready.append(_normalised(resize_image(exemplar, (size, size)), config.mean, config.std))
        else:
            ready.append(cropped_pixels(exemplar, settings))
    return torch.stack(ready)


def cropped_pixels(image: np.ndarray, settings: CropSettings) -> Tensor:
    """Return an image (``h w 3``, uint8 or float32 in [-1, 1]) as the tower takes it, ``(3, s, s)``."""
    array = image if image.dtype == np.uint8 else to_bytes(to_unit(image))
    square = clip_crop(array, settings.crop, settings.shortest_edge, settings.resample)
    return _normalised(square, settings.mean, settings.std)


def _normalised(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    pixels = pixels.float() / 255.0 if image.dtype == np.uint8 else pixels / 2.0 + 0.5
    return rearrange((pixels - torch.tensor(mean)) / torch.tensor(std), "h w c -> c h w")


def check_embeds(embeds: Any, context_dim: int) -> Tensor:
    """Check a condition given instead of exemplars, ``(b, tokens, context_dim)``, and return it."""
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        raise EditTypeError(
            f"exemplar_embeds: {type(embeds).__name__}; it must be a floating-point torch.Tensor"
        )
    if embeds.ndim != 3 or embeds.shape[2] != context_dim or 0 in embeds.shape:
        raise EditValueError(
            f"exemplar_embeds have the shape {tuple(embeds.shape)}; they must be (b, tokens, {context_dim})"
        )
    if not torch.isfinite(embeds).all():
        raise EditValueError("exemplar_embeds: its values must be finite numbers")
    return embeds
