"""What must hold for every training sample, whatever went in."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cv2
import numpy as np

from pbe.config import SampleConfig
from pbe.data.samples.masks import rectangle_mask
from pbe.data.samples.sample import NO_OBJECT_MASK, TrainingSample

EVENTS = frozenset({"shrunk", "padded", "squashed", "redrawn", "fallback", NO_OBJECT_MASK})


def box_cover(sample: TrainingSample) -> float:
    """Return the share of the box's pixels that the mask covers, 0 to 1."""
    size = sample.mask.shape[0]
    inside = rectangle_mask(sample.box, size, size) > 0
    return float((sample.mask[inside] > 0).mean()) if inside.any() else 1.0


def _wrong_arrays(sample: TrainingSample, size: int, exemplar_size: int) -> Iterator[str]:
    shapes = {
        "image": (size, size, 3),
        "mask": (size, size),
        "valid": (size, size),
        "exemplar": (exemplar_size, exemplar_size, 3),
    }
    for name, shape in shapes.items():
        array = getattr(sample, name)
        if array.shape != shape or array.dtype != np.uint8:
            yield f"{name} is {array.dtype} of {array.shape}, not uint8 of {shape}"
    for name in ("mask", "valid"):
        if set(np.unique(getattr(sample, name))) - {0, 255}:
            yield f"{name} holds other values than 0 and 255"


def _wrong_places(sample: TrainingSample, size: int) -> Iterator[str]:
    for name in ("box", "extended"):
        box = getattr(sample, name)
        values = [box.x1, box.y1, box.x2, box.y2]
        ordered = box.x1 <= box.x2 and box.y1 <= box.y2
        if not all(math.isfinite(value) and 0 <= value <= size for value in values) or not ordered:
            yield f"{name} is {box}, not within 0 .. {size}"
    if set(sample.events) - EVENTS:
        yield f"unknown events among {sample.events}"


def check_sample(sample: TrainingSample, config: SampleConfig, size: int, exemplar_size: int) -> list[str]:
    """Return what is wrong with a sample, a line each; nothing for a good one.

    Args:
        sample: of :func:`pbe.data.samples.sample.make_sample`.
        config: that it was made with.
        size: sides of the image, pixels.
        exemplar_size: sides of the exemplar, pixels.
    """
    faults = [*_wrong_arrays(sample, size, exemplar_size), *_wrong_places(sample, size)]
    if faults:
        return faults
    masked = cv2.countNonZero(sample.mask)
    if masked == 0:
        faults.append("the mask is empty")
    kept = 1.0 - masked / sample.mask.size
    if kept <= 0.0 or kept < config.min_keep_share:
        faults.append(f"nothing is kept, or too little: {kept:.4f}")
    if not sample.valid.any():
        faults.append("nothing counts in the loss")
    thing, cover = "box", box_cover(sample)
    if sample.mask_kind == "object":  # which may be much smaller than its box
        thing, cover = "object", sample.object_cover or 0.0
    if cover < config.min_box_cover:
        faults.append(f"the mask covers {cover:.4f} of the {thing}, not {config.min_box_cover}")
    return faults
