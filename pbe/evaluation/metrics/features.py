"""EfficientNet-Lite2 features of picture regions: what the toy world's similarity scores are made of.

The tower is kept for scoring: no model of the toy world has seen it.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.checkpoints.tower_weights import lite_state, lite_weights
from pbe.errors import UserError

TOWER = "tf_efficientnet_lite2"
SIZE = 128
CENTRE, SPREAD = 127.0, 128.0  # the packages' normalisation: (x - 127) / 128
RESIZE_FILTER = "bilinear, align_corners=False, no antialias, float32"
CROP_RULE = "bounding box of the mask, both axes stretched to the square; exemplars whole"


@dataclass(frozen=True)
class FeatureCard:
    """What a similarity score rests on.

    Attributes:
        tower: timm's name.
        weights: name of the weight file.
        sha256: of that file.
        width: length of a feature vector.
        input_size: side of the tower's input, pixels.
        resize_filter: how a region comes to that size.
        crop_rule: which region is looked at.
    """

    tower: str
    weights: str
    sha256: str
    width: int
    input_size: int = SIZE
    resize_filter: str = RESIZE_FILTER
    crop_rule: str = CROP_RULE

    def to_dict(self) -> dict[str, str | int]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


class LiteFeatures:
    """The frozen tower with its card; makes pooled features of uint8 pictures.

    Raises:
        UserError: the package with the weights is not installed.
    """

    def __init__(self) -> None:
        path = lite_weights(TOWER)
        self.tower = build_lite(path)
        width = int(getattr(self.tower, "num_features", 0))
        self.card = FeatureCard(TOWER, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), width)

    def of_pictures(
        self, pictures: list[np.ndarray], batch_size: int = 64, *, grey: bool = False
    ) -> np.ndarray:
        """Return the features, float32 ``(n, width)``, of pictures, each uint8 ``h w 3`` of any size.

        Args:
            pictures: any number.
            batch_size: pictures at a time.
            grey: turn them grey first, see :func:`to_grey`.
        """
        if grey:
            pictures = [to_grey(picture) for picture in pictures]
        batches = [pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size)]
        with torch.inference_mode():
            features = [self.tower(torch.cat([to_input(picture) for picture in batch])) for batch in batches]
        return torch.cat(features).numpy()

    def of_regions(
        self, pictures: np.ndarray, masks: np.ndarray, batch_size: int = 64, *, grey: bool = False
    ) -> np.ndarray:
        """Return the features of the masked regions.

        Args:
            pictures: uint8 ``n h w 3``.
            masks: uint8 ``n h w``, above 127 = the region.
            batch_size: regions at a time.
            grey: turn them grey first.
        """
        regions = [region(p, m) for p, m in zip(pictures, masks, strict=True)]
        return self.of_pictures(regions, batch_size, grey=grey)


def build_lite(path: Path) -> nn.Module:
    """Return EfficientNet-Lite2 without its classifier, with the weights of ``path``, in evaluation mode."""
    tower = timm.create_model(TOWER, pretrained=False, num_classes=0)
    tower.load_state_dict(lite_state(path, drop_head=True))
    tower = tower.to(memory_format=torch.channels_last)  # up to twice as fast on a CPU, same to 2e-6
    return tower.eval().requires_grad_(False)


def mask_bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the bounding box ``(x1, y1, x2, y2)``, the last two exclusive, of a mask's pixels above 127.

    Raises:
        UserError: the mask is empty.
    """
    x, y, width, height = cv2.boundingRect((mask > 127).astype(np.uint8))
    if width == 0 or height == 0:
        raise UserError("a mask without a hole has no region to score")
    return x, y, x + width, y + height


def region(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Cut the bounding box of a mask (uint8 ``h w``) out of a picture (uint8 ``h w 3``)."""
    if picture.shape[:2] != mask.shape[:2]:
        raise UserError(f"the picture is {picture.shape[:2]} but its mask {mask.shape[:2]} (height, width)")
    x1, y1, x2, y2 = mask_bounds(mask)
    return picture[y1:y2, x1:x2]


def to_grey(picture: np.ndarray) -> np.ndarray:
    """Return an image (uint8 ``h w 3``) with its luma (ITU-R BT.601, rounded) in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def to_input(picture: np.ndarray) -> Tensor:
    """Return a picture, uint8 ``h w 3``, as the tower's input, float32 ``(1, 3, 128, 128)``."""
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (resized - CENTRE) / SPREAD
