"""Regions of images, and the feature towers that scores look at them with; weights come from files.

The towers are CLIP, DINO, Inception, and EfficientNet-Lite2, which is kept for scoring: no model of the toy
world has seen it. Nothing is downloaded unless an open_clip tag is named; a tower whose weights are not given
is no error: the scores that need it are returned as not run.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import open_clip
import timm
import torch
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIPVisionCfg, _build_vision_tower  # no public builder of the tower alone
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.checkpoints.tower_weights import (
    image_tower,
    lite_state,
    lite_weights,
    load_strictly,
    read_state,
    tagged_tower,
)
from pbe.checkpoints.weight_files import is_program
from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.evaluation.metrics.base import NotRunError, ScoreCard
from pbe.files import sha256_of
from pbe.models.image_tower import build_tower

LITE_TOWER = "tf_efficientnet_lite2"
LITE_SIZE = 128
CENTRE, SPREAD = 127.0, 128.0  # the packages' normalisation: (x - 127) / 128
LITE_FILTER = "bilinear, align_corners=False, no antialias, float32"
WHOLE = "shorter side by antialiased bicubic (Pillow), centre crop"
SQUASHED = "both axes stretched to the square by antialiased bicubic (Pillow)"
# What PyTorch raises of files that are no state dict, and building raises of those of another network.
UNREADABLE = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OSError,
    EOFError,
    struct.error,
    pickle.UnpicklingError,
    UserError,
)
INCEPTION = "both axes to 299 px by TensorFlow 1's bilinear (torch-fidelity)"
OTHERS_ALLOWED = ("clip", "dino")  # roles whose architecture may be another one


def build_lite(path: Path) -> nn.Module:
    """Return EfficientNet-Lite2 without its classifier, with the weights of ``path``, in evaluation mode."""
    tower = timm.create_model(LITE_TOWER, pretrained=False, num_classes=0)
    tower.load_state_dict(lite_state(path, drop_head=True))
    tower = tower.to(memory_format=torch.channels_last)  # up to twice as fast on a CPU, same to 2e-6
    return tower.eval().requires_grad_(False)


def to_input(image: np.ndarray) -> Tensor:
    """Return an image, uint8 ``h w 3``, as the tower's input, float32 ``(1, 3, 128, 128)``."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(LITE_SIZE, LITE_SIZE), mode="bilinear", align_corners=False)
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


@dataclass(frozen=True)
class TowerSpec:
    """Architecture and input of a tower.

    Attributes:
        architecture: an open_clip name (the image tower with its projection), ``timm/<name>``, or
            ``vit/<sizes>`` as :func:`pbe.models.image_tower.build_tower` reads it (without a projection).
        size: side of the input, pixels.
        mean: of the normalisation, for each channel of [0, 1].
        std: of the normalisation.
    """

    architecture: str
    size: int = 224
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    std: tuple[float, ...] = OPENAI_DATASET_STD


TOWERS = {
    "clip": TowerSpec("ViT-B-32-quickgelu"),
    "dino": TowerSpec("timm/vit_base_patch16_224.dino", 224, IMAGENET_MEAN, IMAGENET_STD),
    "inception": TowerSpec("inception-v3-compat", 299),
    "lite2": TowerSpec(f"timm/{LITE_TOWER}", LITE_SIZE),
}


class Tower:
    """A frozen network, ``(b, 3, s, s)`` normalised to ``(b, width)``, that turns images into features."""

    whole_filter, squashed_filter = WHOLE, SQUASHED

    def __init__(self, spec: TowerSpec, network: nn.Module, sha256: str, device: str = "cpu") -> None:
        self.spec, self.sha256, self.device = spec, sha256, device
        self.key = f"{spec} {sha256}"  # under which features are shared
        self.network = network.eval().requires_grad_(False).to(device)

    def card(self, crop_rule: str, *, resize_filter: str = "", **more: Any) -> ScoreCard:
        """Return the card of a score of its features, of stretched images unless a filter is named."""
        resize_filter = resize_filter or self.squashed_filter
        return ScoreCard(self.spec.architecture, self.sha256, resize_filter, crop_rule, **more)

    def whole(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the features of images, uint8 ``h w 3``, shown as :attr:`whole_filter` says."""
        return self.run([self.normalise(centre_crop(one, self.spec.size)) for one in images])

    def squashed(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the features of images, uint8 ``h w 3``, shown as :attr:`squashed_filter` says."""
        return self.run([self.normalise(squash(one, self.spec.size)) for one in images])

    def normalise(self, image: np.ndarray) -> Tensor:
        """Return an image, uint8 ``h w 3``, normalised for the network, float32 ``(3, h, w)``."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
        mean, std = torch.tensor(self.spec.mean), torch.tensor(self.spec.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def run(self, pixels: Sequence[Tensor]) -> np.ndarray:
        """Return the features of inputs, each ``(3, s, s)``, of one batch."""
        with torch.inference_mode():
            return self.network(torch.stack(list(pixels)).to(self.device)).float().cpu().numpy()


class LiteTower(Tower):
    """EfficientNet-Lite2 as the toy world's scores have always used it: images stretched to the square."""

    whole_filter = squashed_filter = LITE_FILTER

    def whole(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the 1280 pooled features of images."""
        return self.run([to_input(one)[0] for one in images])

    squashed = whole


class InceptionTower(Tower):
    """torch-fidelity's Inception, which brings its own resize; images may differ in size."""

    whole_filter = squashed_filter = INCEPTION

    def whole(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the 2048 pooled features of images."""
        features = []
        with torch.inference_mode():
            for one in images:
                pixels = torch.from_numpy(np.array(one)).permute(2, 0, 1)[None]
                features.append(self.network(pixels.to(self.device))[0].float().cpu().numpy())
        return np.concatenate(features)

    squashed = whole


def squash(image: np.ndarray, size: int) -> np.ndarray:
    """Stretch an image, uint8 ``h w 3``, to a square with Pillow's antialiased bicubic filter."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def centre_crop(
    image: np.ndarray, size: int, resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Show an image as CLIP's own preprocessing does: the shorter side to ``size``, the middle cut out.

    The image is uint8 ``h w 3``, the filter one of Pillow's antialiased; bicubic is CLIP's.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = (size * width // short, size * height // short)
    resized = np.asarray(Image.fromarray(image).resize(scaled, resampling))
    top, left = round((scaled[1] - size) / 2), round((scaled[0] - size) / 2)
    return resized[top : top + size, left : left + size]


def load_tower(role: str, architecture: str | None, weights: str | None, device: str = "cpu") -> Tower:
    """Build a tower and load its weights.

    Args:
        role: key of :data:`TOWERS`.
        architecture: another one than the role's own, which :data:`OTHERS_ALLOWED` may have; its input stays
            the role's.
        weights: a file (safetensors, a plain state dict or OpenAI's TorchScript archive; of all of CLIP or of
            its image tower), for ``clip`` also a tag of open_clip, which may download. None: not
            given, a NotRunError; Lite2 has its package.
        device: where it runs.
    """
    spec = TOWERS[role]
    if architecture is not None:
        spec = TowerSpec(architecture, spec.size, spec.mean, spec.std)
    if role == "lite2":
        return _load_lite(spec, weights, device)
    if weights is None:
        raise NotRunError(f"needs the weights of {spec.architecture}: --tower-weights {role}=FILE")
    if role == "inception":
        return _load_inception(spec, Path(weights), device)
    if not Path(weights).is_file() and weights in open_clip.list_pretrained_tags_by_model(spec.architecture):
        network = tagged_tower(spec.architecture, weights)
        return Tower(spec, network, state_sha256(network), device)
    network = build_network(spec)
    path = Path(weights)
    load_strictly(network, image_tower(read_state(path)), path, spec.architecture)
    return Tower(spec, network, sha256_of(path), device)


def build_network(spec: TowerSpec) -> nn.Module:
    """Return the untrained network of a specification."""
    name = spec.architecture
    if name.startswith("vit/"):
        return build_tower(ExemplarEncoderConfig(tower=name, image_size=spec.size))[0]
    if name.startswith("timm/"):
        model = name.removeprefix("timm/")
        if not timm.is_model(model):
            raise UserError(f"timm has no model '{model}'")
        known = timm.get_pretrained_cfg(model)
        if known is not None and known.fixed_input_size and known.input_size[-1] != spec.size:
            side = known.input_size[-1]
            raise UserError(f"{name} takes images of {side} pixels; the score's have {spec.size}")
        return timm.create_model(model, pretrained=False, num_classes=0)
    known = open_clip.get_model_config(name)
    if known is None:
        raise UserError(f"'{name}' is neither an architecture of open_clip.list_models() nor timm/<name>")
    vision = dict(known["vision_cfg"]) | {"image_size": spec.size}
    quick = bool(known.get("quick_gelu", False))
    return _build_vision_tower(known["embed_dim"], CLIPVisionCfg(**vision), quick_gelu=quick)


def _load_lite(spec: TowerSpec, weights: str | None, device: str) -> Tower:
    try:
        path = Path(weights) if weights is not None else lite_weights(LITE_TOWER)
    except UserError as error:
        raise NotRunError(f"needs a package: {error}") from error
    if not path.is_file():
        raise UserError(f"there is no file '{path}' of tower weights")
    try:
        network = build_lite(path)
    except UNREADABLE as error:
        raise UserError(f"'{path}' holds no weights of EfficientNet-Lite2") from error
    return LiteTower(spec, network, sha256_of(path), device)


def _load_inception(spec: TowerSpec, path: Path, device: str) -> Tower:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise NotRunError("needs torch-fidelity: pip install 'pbe[evaluation]'") from error
    read_state(path)  # refuses what is more than tensors; torch-fidelity itself would unpickle anything
    if is_program(path):  # of which tensors can be read, but torch-fidelity would run it
        raise UserError(f"'{path}' is a TorchScript program, not a state dict of torch-fidelity's Inception")
    try:
        network = FeatureExtractorInceptionV3(
            spec.architecture, ["2048"], feature_extractor_weights_path=str(path)
        )
    except (RuntimeError, TypeError) as error:
        raise UserError(f"'{path}' holds no weights of torch-fidelity's Inception") from error
    return InceptionTower(spec, network, sha256_of(path), device)


def state_sha256(network: nn.Module) -> str:
    """Return the SHA-256 of a network's tensors, names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
