"""Strong augmentation of the exemplar (Paint by Example, section 3.3), by albumentations.

Flip, rotation, box blur, and the random affine that the original's ElasticTransform amounted to: its
displacement field was negligible, but three points of the 224 px image moved by up to 50 px each.
"""

from __future__ import annotations

import os

# albumentations asks the network for its newest version when it is imported; this package never does.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import random
from typing import Any

import albumentations
import cv2
import numpy as np
from albumentations.core.transforms_interface import BaseTransformInitSchema, ImageOnlyTransform

from pbe.config import AugmentConfig
from pbe.data.samples.crops import resize

REFERENCE_SIZE = 224
# The original's centre +- a third of the image, (112 +- 74), without the bottom left corner.
ANCHORS = np.array([[186.0, 186.0], [186.0, 38.0], [38.0, 38.0]])


class ThreePointAffine(ImageOnlyTransform):  # type: ignore[misc]
    """Affine map fixed by three points, each coordinate of which moves by U(-jitter, jitter).

    Args:
        jitter: largest shift in pixels of an image of 224 px; it scales with the image.
        p: probability.

    Targets:
        image

    Image types:
        uint8, float32
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
    largest = 2 * round((7 * size / REFERENCE_SIZE - 1) / 2) + 1
    smallest = 2 * round((3 * size / REFERENCE_SIZE - 1) / 2) + 1
    return max(3, smallest), max(3, largest)


class ExemplarAugmentation:
    """Turns the crop of an object into a square, strongly augmented exemplar.

    Args:
        config: probabilities and ranges; with ``enabled`` off only the size changes.
        size: pixels of the exemplar's sides.
        antialias_above: see :func:`pbe.data.samples.crops.resize`.
    """

    def __init__(self, config: AugmentConfig, size: int, antialias_above: float = 1.0) -> None:
        self.size = size
        self.antialias_above = antialias_above
        self._transform = None
        if config.enabled:
            self._transform = albumentations.Compose(
                [
                    albumentations.HorizontalFlip(p=config.flip),
                    albumentations.Rotate(
                        limit=(-config.rotate_limit, config.rotate_limit),
                        interpolation=cv2.INTER_LINEAR,
                        border_mode=cv2.BORDER_REFLECT_101,
                        p=config.rotate,
                    ),
                    albumentations.Blur(blur_limit=blur_range(size), p=config.blur),
                    ThreePointAffine(jitter=config.affine_jitter, p=config.affine),
                ]
            )

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the exemplar, uint8 ``size size 3``, of a crop, uint8 ``h w 3``; advances ``rng``."""
        exemplar = resize(crop, self.size, self.size, self.antialias_above)
        if self._transform is None:
            return exemplar
        # One shared pair of generators. Compose's own seeding gives every transform the same stream, and
        # then a flip and a rotation of equal probability always come together.
        self._transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        return self._transform(image=exemplar)["image"]
