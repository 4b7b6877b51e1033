"""From pictures and masks to what the networks take: sizes, padding, the exemplar's square, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from pbe.editing.pictures import as_mask, as_picture, fit_mask
from pbe.editing.problems import EditTypeError, EditValueError

Size = tuple[int, int]  # height, width
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Triple:
    """What one edit is made from: two times uint8 ``h w 3``, and bool ``h w`` of the picture's size."""

    exemplar: np.ndarray
    picture: np.ndarray
    hole: np.ndarray


def working_size(size: Size, image_size: int, height: int | None = None, width: int | None = None) -> Size:
    """Return the (height, width) at which a picture is edited.

    A picture of at most ``(2 image_size)^2`` pixels is edited as it is. A larger one is reduced until its
    short side is ``image_size``, and further where it would still have more pixels than that.

    Args:
        size: height and width of the picture.
        image_size: the model's training resolution.
        height: asks for another height; None leaves it.
        width: asks for another width; None leaves it.

    Raises:
        EditValueError: a height or width below 1.
    """
    limit = (2 * image_size) ** 2
    pixels, scale = size[0] * size[1], 1.0
    if pixels > limit:
        scale = min(image_size / min(size), math.sqrt(limit / pixels), 1.0)
    automatic = [max(1, round(side * scale)) for side in size]
    for name, value in (("height", height), ("width", width)):
        if value is not None and value < 1:
            raise EditValueError(f"{name} is {value}; it must be at least 1")
    return height or automatic[0], width or automatic[1]


def resize_picture(picture: np.ndarray, size: Size) -> np.ndarray:
    """Resize uint8 ``h w 3`` to (height, width), bicubic and antialiased."""
    if picture.shape[:2] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))


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
    for axis in (0, 1):
        missing = -array.shape[axis] % multiple
        pads = [(0, 0)] * array.ndim
        pads[axis] = (0, missing)
        array = np.pad(array, pads, mode="reflect" if missing < array.shape[axis] else "edge")
    return array


def network_inputs(triples: Sequence[Triple], size: Size, multiple: int) -> tuple[Tensor, Tensor]:
    """Resize, pad and stack pictures and masks.

    Args:
        triples: b edits.
        size: the working size.
        multiple: the padded sides are multiples of this.

    Returns:
        Images ``(b, 3, H, W)`` float32 in [-1, 1] and keep masks ``(b, 1, H, W)`` float32, 1 = keep.
    """
    padded = [pad_to_multiple(resize_picture(triple.picture, size), multiple) for triple in triples]
    images = rearrange(torch.from_numpy(np.stack(padded)), "b h w c -> b c h w").float() / 127.5 - 1.0
    keep = [~pad_to_multiple(reduce_mask(triple.hole, size), multiple) for triple in triples]
    return images, torch.from_numpy(np.stack(keep)).float()[:, None]


def squash_exemplars(exemplars: Sequence[np.ndarray], size: int) -> Tensor:
    """Squash exemplars, uint8 ``h w 3`` each, to the tower's square: ``(b, 3, size, size)`` uint8.

    Bicubic whatever the aspect, as the original's inference does.
    """
    squares = [resize_picture(exemplar, (size, size)) for exemplar in exemplars]
    return rearrange(torch.from_numpy(np.stack(squares)), "b h w c -> b c h w").contiguous()


def draw_noise(shape: tuple[int, ...], generator: Generators) -> Tensor:
    """Draw standard normal noise ``(b, ...)`` on the CPU, item i from generator i where there is one each."""
    if isinstance(generator, Sequence):
        return torch.cat([torch.randn((1, *shape[1:]), generator=each) for each in generator])
    return torch.randn(shape, generator=generator)


def check_generator(generator: Generators, count: int) -> None:
    """Check that ``generator`` is None, one CPU generator, or ``count`` of them.

    Raises:
        EditTypeError: something else than a generator.
        EditValueError: a generator of another device, or another number of them.
    """
    several = isinstance(generator, Sequence)
    if several and len(generator) != count:  # type: ignore[arg-type]
        raise EditValueError(f"{len(generator)} generators for {count} images")  # type: ignore[arg-type]
    for each in generator if several else [generator]:  # type: ignore[union-attr]
        if each is None and not several:
            continue
        if not isinstance(each, torch.Generator):
            raise EditTypeError(f"generator: {type(each).__name__}; it must be a torch.Generator")
        if each.device.type != "cpu":
            raise EditValueError(
                f"the generator is on {each.device}; it must be on the CPU, where noise is drawn"
            )


def matched(example_image: Any, image: Any, mask_image: Any, copies: int = 1) -> list[Triple]:
    """Pair exemplars, pictures and masks: each comes once, or once for each picture of the batch.

    Args:
        example_image: exemplar(s) in any form that :func:`pbe.editing.pictures.as_picture` takes.
        image: picture(s), likewise.
        mask_image: mask(s) in any form that :func:`pbe.editing.pictures.as_mask` takes.
        copies: edits of each picture, which follow one another.

    Raises:
        EditTypeError: something that is no picture.
        EditValueError: numbers that do not match, pictures of different sizes, a mask without a hole.
    """
    exemplars = [as_picture(value, "example_image") for value in _as_list(example_image)]
    pictures = [as_picture(value, "image") for value in _as_list(image)]
    holes = [as_mask(value) for value in _as_list(mask_image)]
    count = max(len(exemplars), len(pictures), len(holes))
    if not {len(exemplars), len(pictures), len(holes)} <= {1, count}:
        have = f"{len(exemplars)} exemplars, {len(pictures)} pictures and {len(holes)} masks"
        raise EditValueError(f"{have} do not pair up: give one of each, or the same number")
    sizes = {picture.shape[:2] for picture in pictures}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise EditValueError(f"pictures of one batch must have one size, these have {listed}")
    holes = [fit_mask(hole, pictures[0].shape[:2]) for hole in holes]
    whole = (items * (count // len(items)) for items in (exemplars, pictures, holes))
    return [Triple(*items) for items in zip(*whole, strict=True) for _ in range(copies)]


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value]
    if not value:
        raise EditValueError("an empty list of pictures")
    return list(value)
