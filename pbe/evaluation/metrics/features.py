"""Regions of images as the feature scores look at them, and the toy world's tower, EfficientNet-Lite2.

The tower is kept for scoring: no model of the toy world has seen it.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.checkpoints.tower_weights import lite_state
from pbe.errors import UserError

TOWER = "tf_efficientnet_lite2"
SIZE = 128
CENTRE, SPREAD = 127.0, 128.0  # the packages' normalisation: (x - 127) / 128
RESIZE_FILTER = "bilinear, align_corners=False, no antialias, float32"


def build_lite(path: Path) -> nn.Module:
    """Return EfficientNet-Lite2 without its classifier, with the weights of ``path``, in evaluation mode."""
    tower = timm.create_model(TOWER, pretrained=False, num_classes=0)
    tower.load_state_dict(lite_state(path, drop_head=True))
    tower = tower.to(memory_format=torch.channels_last)  # up to twice as fast on a CPU, same to 2e-6
    return tower.eval().requires_grad_(False)


def to_input(image: np.ndarray) -> Tensor:
    """Return an image, uint8 ``h w 3``, as the tower's input, float32 ``(1, 3, 128, 128)``."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (resized - CENTRE) / SPREAD


def mask_bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the bounding box ``(x1, y1, x2, y2)``, the last two exclusive, of a mask's pixels above 127."""
    x, y, width, height = cv2.boundingRect((mask > 127).astype(np.uint8))
    if width == 0 or height == 0:
        raise UserError("an empty mask has no region to score")
    return x, y, x + width, y + height


def region(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Cut the bounding box of a mask (uint8 ``h w``) out of an image (uint8 ``h w 3``)."""
    if image.shape[:2] != mask.shape[:2]:
        raise UserError(f"the image is {image.shape[:2]} but its mask {mask.shape[:2]} (height, width)")
    x1, y1, x2, y2 = mask_bounds(mask)
    return image[y1:y2, x1:x2]


def to_grey(image: np.ndarray) -> np.ndarray:
    """Return an image (uint8 ``h w 3``) with its luma (ITU-R BT.601, rounded) in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
