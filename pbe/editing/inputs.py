"""Inputs of the pipeline, single or batched, as PIL images, arrays or tensors: checked and paired up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pbe.diffusion.noise import Generators
from pbe.editing.image_files import carried
from pbe.editing.images import as_image, as_mask, aspect_remark, fit_mask
from pbe.editing.preprocess import Exemplar
from pbe.errors import EditTypeError, EditValueError, warn_once


@dataclass(frozen=True)
class Batch:
    """Inputs of a batch of edits.

    Attributes:
        exemplars: one, or one per image; none if the condition is given.
        images: ``h w 3``, uint8 or float32 in [-1, 1], all of one size; an image that several exemplars or
            masks share is repeated.
        masks: bool ``h w`` of the images' size, one per image.
        copies: number of edits of each image, which follow one another.
        carried: metadata to copy into the edits of each image, see :func:`pbe.editing.image_files.carried`.
        generator: for all noise, or one per edit; see the pipeline's call.
        latents: given instead of drawn; likewise.
        masked_image_latents: given instead of encoded; likewise.
        exemplar_embeds: given instead of encoded exemplars; likewise.
    """

    exemplars: list[Exemplar]
    images: list[np.ndarray]
    masks: list[np.ndarray]
    copies: int
    carried: list[dict[str, Any]] = field(default_factory=list)
    generator: Generators = None
    latents: Tensor | None = None
    masked_image_latents: Tensor | None = None
    exemplar_embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images) * self.copies

    def spread(self, rows: Tensor, what: str) -> Tensor:
        """Repeat rows, of which there is one, one per image or one per edit, to one per edit."""
        if len(rows) not in (1, len(self.images), len(self)):
            raise EditValueError(
                f"{what}: {len(rows)} for {len(self)} edits; give one, one per image or one per edit"
            )
        return rows.repeat_interleave(len(self) // len(rows), dim=0)


def match_inputs(
    example_image: Any,
    image: Any,
    mask_image: Any,
    copies: int = 1,
    *,
    conditions: int = 0,
    half_is_masked: bool = True,
) -> Batch:
    """Pair exemplars, images and masks: of each there is one, or one for every image of the batch.

    Args:
        example_image: exemplar(s): PIL images, arrays as :func:`pbe.editing.images.as_image` takes them,
            uint8 tensors, or float tensors ``(3, s, s)`` normalised for the image tower; single, in lists or
            batched.
        image: image(s): PIL images, arrays, or tensors ``(3, h, w)`` or ``(b, 3, h, w)``, uint8 or floating
            point in [-1, 1].
        mask_image: mask(s): PIL images, arrays, or tensors ``(h, w)``, ``(1, h, w)``, ``(b, h, w)``,
            ``(b, 1, h, w)`` or ``(b, h, w, 1)``: bool, uint8, or floating point in [0, 1]. Images and masks
            must both be tensors, or neither.
        copies: edits of each image.
        conditions: number of conditions that are given instead of exemplars; 0 if exemplars are given.
        half_is_masked: whether a floating-point mask value of exactly 0.5 repaints.
    """
    exemplars = [] if conditions else read_exemplars(example_image)
    tensors = _has_tensors(image)
    if tensors != _has_tensors(mask_image):
        raise EditTypeError("image and mask_image must both be tensors, or neither of them")
    given = _split(image, "image", _unbatch_images)
    images = [_image(each) for each in given]
    tags = [carried(each) if isinstance(each, Image.Image) else {} for each in given]
    given_masks = _split(mask_image, "mask_image", _unbatch_masks)
    _refuse_channels(given_masks, mask_image, len(images), len(exemplars) or conditions)
    masks = [as_mask(_to_array(each, "mask_image"), half_is_masked=half_is_masked) for each in given_masks]
    count = _count(len(exemplars), len(images), len(masks), copies, conditions)
    size = _one_size(images)
    if tensors and any(mask.shape != size for mask in masks):
        raise EditValueError(
            f"tensors of image and mask_image must have one height and width; image has {size}"
        )
    for mask in masks:
        if remark := aspect_remark(mask.shape, size):
            warn_once(f"mask_image: {remark}")
    masks = [fit_mask(mask, size) for mask in masks]
    images, masks = (items * (count // len(items)) for items in (images, masks))
    return Batch(exemplars, images, masks, copies, tags * (count // len(tags)))


def read_exemplars(value: Any) -> list[Exemplar]:
    """Return the exemplars of a call, as :func:`match_inputs` takes them."""
    return [_exemplar(each) for each in _split(value, "example_image", _unbatch_images)]


def _count(exemplars: int, images: int, masks: int, copies: int, conditions: int) -> int:
    """Return the number of images once each is paired with an exemplar and a mask."""
    scenes = max(images, masks)
    per_edit = conditions == scenes * copies  # each edit has a condition of its own
    count = scenes if per_edit else max(exemplars, conditions, scenes)
    shown = 1 if per_edit else exemplars or conditions
    if not {shown, images, masks} <= {1, count}:
        have = f"{exemplars or conditions} exemplars, {images} images and {masks} masks"
        raise EditValueError(f"{have} do not pair up: give one of each, or the same number")
    return count


def _one_size(images: Sequence[np.ndarray]) -> tuple[int, int]:
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise EditValueError(f"images of one batch must have one size, these have {listed}")
    height, width = sizes.pop()
    return height, width


def _has_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_tensors(each) for each in value)
    return isinstance(value, Tensor)


def _split(value: Any, what: str, unbatch: Callable[[Any, str], list[Any]]) -> list[Any]:
    """Return the single items of a list, of a batched array or tensor, or of a list of these."""
    if not isinstance(value, list | tuple):
        return unbatch(value, what)
    if not value:
        raise EditValueError(f"{what}: an empty list of images")
    return [item for each in value for item in unbatch(each, what)]


def _unbatch_images(value: Any, what: str) -> list[Any]:
    if not isinstance(value, np.ndarray | Tensor):
        return [value]
    if isinstance(value, Tensor):
        wanted = value.shape[-3] if value.ndim in (3, 4) else 0
        if wanted != 3:
            raise EditValueError(
                f"{what}: a tensor of shape {tuple(value.shape)}; it must be (3, h, w) or (b, 3, h, w)"
            )
    return _items(value, what) if value.ndim == 4 else [value]


def _unbatch_masks(value: Any, what: str) -> list[Any]:
    if isinstance(value, np.ndarray):
        if value.ndim == 4 and value.shape[1] == 1 and value.shape[3] != 1:
            return _items(value[:, 0], what)
        batched = value.ndim == 4 or (value.ndim == 3 and value.shape[2] not in (1, 3, 4))
        return _items(value, what) if batched else [value]
    if not isinstance(value, Tensor):
        return [value]
    if value.ndim in (3, 4) and value.shape[-3] != 1 and value.shape[-1] == 1:
        value = value[..., 0]
    elif value.ndim == 4 and value.shape[1] == 1:
        value = value[:, 0]
    if value.ndim not in (2, 3):
        forms = "(h, w), (1, h, w), (b, h, w) or (b, 1, h, w)"
        raise EditValueError(f"{what}: a tensor of shape {tuple(value.shape)}; it must be {forms}")
    return _items(value, what) if value.ndim == 3 else [value]


def _refuse_channels(masks: Sequence[Any], given: Any, images: int, exemplars: int) -> None:
    """Refuse a single mask with its colour channels first, which would be taken for a batch of masks.

    Three different masks for one image are a batch, with a warning. Three that are equal when thresholded at
    half of the largest value, or of which one is then empty, are the channels of a single mask.
    """
    only = given[0] if isinstance(given, list | tuple) and len(given) == 1 else given
    shape = tuple(getattr(only, "shape", ()))
    if (images, exemplars) != (1, 1) or shape[:-2] not in ((3,), (4,)) or len(masks) != shape[0]:
        return
    planes = np.stack([_to_array(each, "mask_image") for each in masks[:3]])
    if planes.dtype.kind not in "buif" or planes.size == 0 or not np.isfinite(planes).all():
        return  # no mask at all, as will be said
    first, second, third = planes > planes.max() / 2
    same = np.array_equal(first, second) and np.array_equal(first, third)
    if same or not all(each.any() for each in (first, second, third)):
        raise EditValueError(
            f"mask_image: shape {shape} means a batch of masks, and these are the colours of one; "
            "give it as (h, w) or (1, h, w)"
        )
    warn_once(
        f"mask_image: shape {shape} is taken as {len(masks)} masks of one image, which give as many edits"
    )


def _items(values: np.ndarray | Tensor, what: str) -> list[Any]:
    if len(values) == 0:
        raise EditValueError(f"{what}: a batch without images")
    return list(values)


def _exemplar(value: Any) -> Exemplar:
    if isinstance(value, Tensor) and value.is_floating_point():
        if not np.isfinite(_to_array(value, "example_image")).all():
            raise EditValueError("example_image: its values must be finite numbers")
        if value.numel() and value.min() >= 0.0 and value.max() <= 1.0:
            warn_once(
                "example_image: a float tensor is taken as normalised for the image tower, and all values of "
                "this one lie in [0, 1]; give plain pixels as uint8, as an array or as a PIL image"
            )
        return value
    return as_image(_channels_last(value, "example_image"), "example_image")


def _image(value: Any) -> np.ndarray:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return as_image(_channels_last(value, "image"), own_profile=True)
    pixels = np.ascontiguousarray(_to_array(value, "image").transpose(1, 2, 0).astype(np.float32))
    if 0 in pixels.shape:
        raise EditValueError(f"image: a tensor of shape {tuple(value.shape)} has nothing to edit")
    if not ((pixels >= -1.0) & (pixels <= 1.0)).all():
        raise EditValueError("image: a floating-point tensor must lie in [-1, 1]")
    if pixels.min() >= 0.0:
        warn_once(
            "image: a float tensor is taken to lie in [-1, 1], and no value of this one is below 0; "
            "if it lies in [0, 1], give image * 2 - 1"
        )
    return pixels


def _channels_last(value: Any, what: str) -> Any:
    """Turn a uint8 tensor into an array with the channels last; pass everything else through."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype != torch.uint8:
        raise EditTypeError(f"{what}: a tensor of {value.dtype}; it must be floating point or uint8")
    return _to_array(value, what).transpose(1, 2, 0)


def _to_array(value: Any, what: str) -> Any:
    """Turn a tensor into an array; pass everything else through."""
    if not isinstance(value, Tensor):
        return value
    try:
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    except (RuntimeError, TypeError) as error:  # sparse, quantised, or on the meta device
        kind = f"{value.layout} tensor of {value.dtype} on {value.device}"
        raise EditTypeError(f"{what}: a {kind} cannot be read; give a plain one") from error


def check_generator(generator: Generators, count: int) -> None:
    """Check that ``generator`` is None, one CPU generator, or ``count`` of them."""
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
