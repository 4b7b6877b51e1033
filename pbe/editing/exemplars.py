"""From exemplars to the image tower's square: squashed whole, or cropped as CLIP's processor does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pbe.config import ExemplarEncoderConfig
from pbe.editing.preprocess import resize_picture
from pbe.editing.problems import EditTypeError, EditValueError
from pbe.errors import UserError
from pbe.models.image_tower import follow_tower

Exemplar = np.ndarray | Tensor  # a picture, or pixels normalised for the tower
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
    """Return the settings of a ``preprocessor_config.json``; what it leaves open follows from the tower.

    Args:
        config: of the tower.
        preprocessor: the parsed file, of any age; None takes everything from the tower.

    Raises:
        UserError: a setting that is not supported or has no meaning, or a crop of another size than the
            tower's.
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


def preprocessor_config(settings: CropSettings) -> dict[str, Any]:
    """Return the ``preprocessor_config.json`` that :func:`crop_settings` reads these settings from."""
    numbers = {name: number for number, name in FILTERS.items()}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": bool(settings.shortest_edge),
        "size": {"shortest_edge": settings.shortest_edge or settings.crop},
        "resample": numbers[settings.resample],
        "do_center_crop": True,
        "crop_size": {"height": settings.crop, "width": settings.crop},
        "do_rescale": True,
        "rescale_factor": RESCALE,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "do_convert_rgb": True,
    }


def _side(value: Any, key: str) -> int:
    """Return the length that a size of the file stands for: a number, a shortest edge, or a square."""
    if isinstance(value, dict):
        first, *others = [*value.values()] or [None]
        value = first if all(side == first for side in others) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{SOURCE}: {key} must be one length in pixels")
    return value


def clip_crop(
    picture: np.ndarray, size: int, shortest_edge: int | None = None, resample: str = "bicubic"
) -> np.ndarray:
    """Resize the shorter side and cut the square out of the centre, as CLIP's image processor does.

    The numbers are those of torchvision's uint8 resize, which the processor uses.

    Args:
        picture: uint8 ``h w 3``.
        size: side of the square; where the picture is smaller the rest is black.
        shortest_edge: length for the shorter side; None means ``size``, 0 leaves the size.
        resample: ``bicubic`` or ``bilinear``, antialiased.

    Returns:
        uint8 ``size size 3``.
    """
    height, width = picture.shape[:2]
    edge = (size if shortest_edge is None else shortest_edge) or min(height, width)
    short = min(height, width)
    resized = tuple(max(1, edge if side == short else int(edge * side / short)) for side in (height, width))
    pixels = rearrange(torch.from_numpy(np.array(picture)), "h w c -> 1 c h w")
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

    Args:
        exemplars: pictures, uint8 or float32 in [-1, 1] ``h w 3``; or tensors ``(3, s, s)`` that are
            normalised for the tower already and pass as they are.
        config: of the tower.
        settings: crop as these say; None squashes the exemplar whole, bicubic, as the original does.

    Raises:
        EditValueError: a tensor of another size than the tower's.
    """
    ready = [
        _checked(each, config.image_size) if isinstance(each, Tensor) else _normalised(each, config, settings)
        for each in exemplars
    ]
    return torch.stack(ready)


def _normalised(picture: np.ndarray, config: ExemplarEncoderConfig, settings: CropSettings | None) -> Tensor:
    size = config.image_size
    if settings is None:
        square, mean, std = resize_picture(picture, (size, size)), config.mean, config.std
    else:
        square = clip_crop(_bytes(picture), size, settings.shortest_edge, settings.resample)
        mean, std = list(settings.mean), list(settings.std)
    pixels = torch.from_numpy(np.array(square))
    pixels = pixels.float() / 255.0 if square.dtype == np.uint8 else pixels / 2.0 + 0.5
    return rearrange((pixels - torch.tensor(mean)) / torch.tensor(std), "h w c -> c h w")


def _bytes(picture: np.ndarray) -> np.ndarray:
    if picture.dtype == np.uint8:
        return picture
    return np.round((picture / 2.0 + 0.5) * 255.0).astype(np.uint8)


def _checked(pixels: Tensor, size: int) -> Tensor:
    if tuple(pixels.shape) != (3, size, size):
        raise EditValueError(
            "example_image: a float tensor is taken as pixels normalised for the image tower and must be "
            f"(3, {size}, {size}) or (b, 3, {size}, {size}), not {tuple(pixels.shape)}"
        )
    return pixels.float().cpu()


def check_embeds(embeds: Any, context_dim: int) -> Tensor:
    """Check a condition given instead of exemplars, ``(b, tokens, context_dim)``, and return it.

    Raises:
        EditTypeError: no tensor of floating-point numbers.
        EditValueError: another shape, or values that are not finite.
    """
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
