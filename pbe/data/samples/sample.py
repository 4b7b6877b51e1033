"""From an image and one of its boxes to a self-supervised training sample (Paint by Example, section 3).

The object inside the box, strongly augmented (section 3.3), becomes the exemplar; the region around it
becomes the mask. Everything is a pure function of the arguments, including the generator's state.
"""

from __future__ import annotations

import os

# albumentations would ask the network for its newest version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import albumentations
import cv2
import numpy as np
from albumentations.core.transforms_interface import BaseTransformInitSchema, ImageOnlyTransform

from pbe.config import AugmentConfig, SampleConfig
from pbe.data.samples.crops import (
    Box,
    CropPlan,
    cut,
    mirror_mask,
    padded_square,
    plan_original_crop,
    plan_square_crop,
    resize,
    valid_mask,
)
from pbe.data.samples.masks import (
    ObjectMask,
    bezier_mask,
    cut_mask,
    dilated_mask,
    extend_box,
    object_cover,
    rectangle_mask,
)

REFERENCE_SIDE = 512  # short side of the image that lengths in the configuration refer to
REFERENCE_SIZE = 224  # side of the exemplar that they refer to
# The original's centre +- a third of the image, (112 +- 74), without the bottom left corner.
ANCHORS = np.array([[186.0, 186.0], [186.0, 38.0], [38.0, 38.0]])
MAX_TRIES = 20
VERSION = 2  # raise it when the same image, box and draws give another sample: latent caches depend on it
NO_OBJECT_MASK = "no object mask"


class ThreePointAffine(ImageOnlyTransform):  # type: ignore[misc]
    """Affine map given by three points, each coordinate of which moves by U(-jitter, jitter).

    This is what the original's ElasticTransform amounts to: its displacement field is negligible, but three
    points of the 224 px image move by up to 50 px each. ``jitter`` is for an image of 224 px and scales with
    the image. Targets: image, uint8 or float32.
    """

    class InitSchema(BaseTransformInitSchema):  # type: ignore[misc]
        """What albumentations validates."""

        jitter: float

    def __init__(self, jitter: float = 50.0, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.jitter = jitter

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the moved points; return the 2x3 ``matrix`` from old to new pixels."""
        height, width = params["shape"][:2]
        scale = np.array([width, height]) / REFERENCE_SIZE
        moved = ANCHORS + self.random_generator.uniform(-self.jitter, self.jitter, ANCHORS.shape)
        old, new = (ANCHORS * scale).astype(np.float32), (moved * scale).astype(np.float32)
        return {"matrix": cv2.getAffineTransform(old, new)}

    def apply(self, img: np.ndarray, matrix: np.ndarray, **params: Any) -> np.ndarray:
        """Warp ``img`` (``h w c``) with reflected borders."""
        size = (img.shape[1], img.shape[0])
        return cv2.warpAffine(img, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def blur_range(size: int) -> tuple[int, int]:
    """Return the smallest and largest odd kernel: 3 to 7 at 224 px, scaled with the image, at least 3."""
    smallest, largest = (2 * round((k * size / REFERENCE_SIZE - 1) / 2) + 1 for k in (3, 7))
    return max(3, smallest), max(3, largest)


class ExemplarAugmentation:
    """Turns the crop of an object into a square exemplar of ``size`` px: flip, rotation, blur, affine map.

    With ``config.enabled`` off, the crop is only resized; ``antialias_above`` is as in
    :func:`pbe.data.samples.crops.resize`.
    """

    def __init__(self, config: AugmentConfig, size: int, antialias_above: float = 1.0) -> None:
        self.size, self.antialias_above = size, antialias_above
        self._transform = None
        if config.enabled:
            rotation = albumentations.Rotate(
                limit=(-config.rotate_limit, config.rotate_limit),
                interpolation=cv2.INTER_LINEAR,
                border_mode=cv2.BORDER_REFLECT_101,
                p=config.rotate,
            )
            self._transform = albumentations.Compose(
                [
                    albumentations.HorizontalFlip(p=config.flip),
                    rotation,
                    albumentations.Blur(blur_limit=blur_range(size), p=config.blur),
                    ThreePointAffine(jitter=config.affine_jitter, p=config.affine),
                ]
            )

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the exemplar, uint8 ``size size 3``, of a crop, uint8 ``h w 3``; advances ``rng``."""
        exemplar = resize(crop, self.size, self.size, self.antialias_above)
        if self._transform is None:
            return exemplar
        # One shared pair of generators. Compose's own seeding gives every transform the same stream, so that
        # a flip and a rotation of equal probability would always come together.
        self._transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        return self._transform(image=exemplar)["image"]


@functools.lru_cache(maxsize=8)
def _augmentation(
    settings: tuple[tuple[str, float], ...], size: int, antialias_above: float
) -> ExemplarAugmentation:
    return ExemplarAugmentation(AugmentConfig(**dict(settings)), size, antialias_above)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainingSample:
    """A training sample; all images are uint8, with ``s`` the image size and ``e`` the exemplar's.

    Attributes:
        image: the crop, ``s s 3`` RGB.
        mask: 255 = repaint, 0 = keep; ``s s``. Padding that reflects the image reflects the mask, too.
        exemplar: the augmented object, ``e e 3`` RGB.
        valid: 255 = counts in the loss, 0 = padding; ``s s``.
        box: the object in pixels of ``image``.
        extended: the extended box in whole pixels of ``image``; a rectangular mask is exactly this, and its
            mirror images in the padding.
        mask_kind: ``rectangle``, ``arbitrary`` or ``object``.
        jitter: largest shift of an arbitrary mask's points along x and y, pixels of ``image``.
        events: any of ``shrunk``, ``padded``, ``squashed``, ``redrawn``, ``fallback``, ``no object mask``.
        object_cover: share of the object that a mask of kind ``object`` covers; None for other kinds.
    """

    image: np.ndarray
    mask: np.ndarray
    exemplar: np.ndarray
    valid: np.ndarray
    box: Box
    extended: Box
    mask_kind: str
    jitter: tuple[float, float]
    events: tuple[str, ...]
    object_cover: float | None = None


def choose_box(boxes: Sequence[Box], rng: np.random.Generator) -> Box:
    """Return one of the boxes, each as likely as the others; advances ``rng`` by one draw."""
    return boxes[int(rng.integers(len(boxes)))]


def cut_exemplar(image: np.ndarray, box: Box, padding: int) -> np.ndarray:
    """Return the object with some of its surroundings, a view of the image, uint8 ``h w 3``.

    ``padding`` is pixels on each side at a short side of 512, scaled with the image, at least one pixel
    unless zero, and never beyond the image.
    """
    height, width = image.shape[:2]
    pad = max(1, round(padding * min(width, height) / REFERENCE_SIDE)) if padding else 0
    x1, y1 = max(math.floor(box.x1) - pad, 0), max(math.floor(box.y1) - pad, 0)
    x2, y2 = min(math.ceil(box.x2) + pad, width), min(math.ceil(box.y2) + pad, height)
    return image[y1:y2, x1:x2]


@dataclass(frozen=True)
class _Kind:
    """Kind of mask to draw; for the kind ``object``, ``shape`` is the object's mask of the whole image."""

    name: str
    shape: np.ndarray | None = None


@dataclass(frozen=True)
class _MaskedCrop:
    """A crop with its mask at the output's resolution."""

    plan: CropPlan
    box: Box
    extended: Box
    mask: np.ndarray
    jitter: tuple[float, float]
    object_cover: float | None = None


def _draw_mask(
    plan: CropPlan,
    box: Box,
    frame: tuple[int, int],
    kind: _Kind,
    rng: np.random.Generator,
    config: SampleConfig,
    size: int,
) -> _MaskedCrop:
    """Draw the mask at the output's resolution; a rectangle is exactly the extended box."""
    inner = plan.crop.to_output(box, size).clipped(size, size)
    extended = plan.crop.to_output(plan.extended, size).rounded_out(size, size)
    # Lengths are for an image of 512 px and are then scaled with the crop.
    unit = min(frame) / REFERENCE_SIDE
    pixels = config.bezier_jitter * unit
    sx, sy = plan.crop.scales(size)
    jitter = (pixels * sx, pixels * sy)
    if kind.shape is not None:
        cover = cut_mask(kind.shape, plan.crop, size)
        wider = config.object_mask_dilate * unit
        mask = dilated_mask(cover, (wider * sx, wider * sy))
        return _MaskedCrop(plan, inner, extended, mask, jitter, object_cover(cover, mask))
    if kind.name == "rectangle":
        mask = rectangle_mask(extended, size, size)
    else:
        mask = bezier_mask(inner, extended, size, size, jitter, rng, config.min_box_cover)
    return _MaskedCrop(plan, inner, extended, _mirrored(mask, inner, plan, frame), jitter)


def _mirrored(mask: np.ndarray, box: Box, plan: CropPlan, frame: tuple[int, int]) -> np.ndarray:
    """Return a mask that also hides the mirror images of itself, and of the whole box, in the padding."""
    if "padded" not in plan.events:
        return mask
    size = len(mask)
    hidden = mirror_mask(cv2.bitwise_or(mask, rectangle_mask(box, size, size)), plan.crop, *frame)
    return np.where(valid_mask(plan.crop, *frame, size) > 0, mask, hidden)


def _find_crop(
    box: Box, frame: tuple[int, int], kind: _Kind, rng: np.random.Generator, config: SampleConfig, size: int
) -> tuple[_MaskedCrop, tuple[str, ...]]:
    """Draw crops and masks until enough of the image stays unmasked; return the last one and its events.

    If that fails, it is the whole image inside a grey border, with the box itself as the mask.
    """
    for attempt in range(MAX_TRIES):
        extended = extend_box(box, *frame, config.extend_fraction, rng)
        if config.squash:
            plan = plan_original_crop(extended, *frame, config.shrink_fraction, rng)
        else:
            plan = plan_square_crop(box, extended, *frame, config.shrink_fraction, rng)
        drawn = _draw_mask(plan, box, frame, kind, rng, config, size)
        if 1.0 - cv2.countNonZero(drawn.mask) / drawn.mask.size >= config.min_keep_share:
            return drawn, plan.events + (("redrawn",) if attempt else ())
    # The square is at least an eighth longer than the image, so that a fifth of it stays unmasked even
    # where the box is the whole image. A reflection in the border would be masked as the image is.
    crop = padded_square(*frame, math.ceil(1.125 * max(frame)) + 1, mirrored=False)
    plan = CropPlan(crop, box, ("padded", "fallback"))
    drawn = _draw_mask(plan, box, frame, _Kind("rectangle"), rng, config, size)
    return drawn, (*plan.events, "redrawn")


def _choose_kind(
    rng: np.random.Generator, config: SampleConfig, object_mask: ObjectMask | None
) -> tuple[_Kind, tuple[str, ...]]:
    """Draw the kind of mask; the object's mask is read only if needed, and a share of 0 takes no draw."""
    own = config.object_mask_share > 0 and rng.random() < config.object_mask_share
    usual = "arbitrary" if rng.random() < config.arbitrary_mask_share else "rectangle"
    if not own:
        return _Kind(usual), ()
    shape = object_mask() if object_mask is not None else None
    return (_Kind(usual), (NO_OBJECT_MASK,)) if shape is None else (_Kind("object", shape), ())


def make_sample(
    image: np.ndarray,
    box: Box,
    rng: np.random.Generator,
    config: SampleConfig,
    image_size: int,
    exemplar_size: int,
    object_mask: ObjectMask | None = None,
) -> TrainingSample:
    """Make a training sample; the same arguments and generator state give the same bytes.

    Args:
        image: uint8 ``h w 3`` RGB, both sides at least 2 pixels.
        box: around an object, inside the image, at least a pixel a side.
        rng: generator that is advanced.
        config: shares and ranges.
        image_size: sides of the image and mask, pixels.
        exemplar_size: sides of the exemplar, pixels.
        object_mask: returns the object's mask, uint8 ``h w``, nonzero on the object, at least somewhere in
            the box, or None. Called only when that kind of mask is drawn.
    """
    height, width = image.shape[:2]
    settings = tuple(vars(config.augment).items())
    augment = _augmentation(settings, exemplar_size, config.antialias_above)
    exemplar = augment(cut_exemplar(image, box, config.exemplar_padding), rng)
    # Whole pixels from here on, so that a crop of whole pixels contains the whole box.
    box = box.rounded_out(width, height)
    # The kind is drawn once: a redrawn crop must not change the share of arbitrary masks.
    kind, missing = _choose_kind(rng, config, object_mask)
    drawn, events = _find_crop(box, (width, height), kind, rng, config, image_size)
    crop = drawn.plan.crop
    return TrainingSample(
        image=cut(image, crop, image_size, config.antialias_above),
        mask=drawn.mask,
        exemplar=exemplar,
        valid=valid_mask(crop, width, height, image_size),
        box=drawn.box,
        extended=drawn.extended,
        mask_kind="rectangle" if "fallback" in events else kind.name,
        jitter=drawn.jitter,
        events=(*events, *missing),
        object_cover=drawn.object_cover,
    )
