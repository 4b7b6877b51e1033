"""Distance of images as a network sees them: LPIPS (Zhang et al. 2018), and the same on an image tower."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from pbe.checkpoints.key_map import check_finite
from pbe.errors import UserError
from pbe.models.exemplar_encoder import PYRAMID, ExemplarEncoder, layout_stages
from pbe.models.image_tower import stage_widths, tower_stages

# Where torchvision's VGG16 has done the last ReLU before each pooling, and the channels there.
ENDS = (4, 9, 16, 23, 30)
CHANNELS = (64, 128, 256, 512, 512)
# LPIPS brings pictures in [-1, 1] to what torchvision's VGG16 was trained on with these.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
UNREADABLE = (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, SafetensorError)


class PerceptualDistance(nn.Module):
    """LPIPS: features of five layers, unit length at each position, squared differences, weighted sum.

    Args:
        vgg: state dict of torchvision's ``vgg16``; its classifier is left out.
        linear: LPIPS's non-negative weights by channel, ``lin0.model.1.weight`` to ``lin4...``
            ``(1, c, 1, 1)``; None weighs all channels of a layer alike (the mean over them).

    Raises:
        KeyError: a tensor is missing; RuntimeError: it has another shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: dict[str, Tensor], linear: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        with torch.device("meta"):
            layers = make_layers(cfgs["D"], batch_norm=False)
        state = {key: vgg[f"features.{key}"].float() for key in layers.state_dict()}
        layers.load_state_dict(state, assign=True)
        for layer in layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # what a slice returns must stay as it is
        self.slices = nn.ModuleList(layers[start:stop] for start, stop in pairwise((0, *ENDS)))
        for index, channels in enumerate(CHANNELS):
            self.register_buffer(f"weight{index}", _channel_weights(linear, index, channels))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distances ``(b,)`` of pictures ``(b, 3, h, w)`` in [-1, 1], with sides of 16 or more."""
        total = first.new_zeros(len(first), dtype=torch.float32)
        # one after the other: where only one asks for a gradient, the other's features are not kept
        one, other = ((x - self.shift) / self.scale for x in (first, second))
        for index, part in enumerate(self.slices):
            one, other = part(one), part(other)
            squares = (_unit_length(one.float()) - _unit_length(other.float())) ** 2
            total = total + (squares * self.get_buffer(f"weight{index}")).sum(dim=1).mean(dim=(1, 2))
        return total


class TowerDistance:
    """The same distance on the maps of an image tower: unit length, squared differences, summed over maps.

    A pyramid is compared at all stages but its last, a transformer at three quarters of its depth. The tower
    stays with its owner: it is no part of what a checkpoint of a task would hold twice.

    Args:
        encoder: whose tower, with its mean, deviation and size.
    """

    def __init__(self, encoder: ExemplarEncoder) -> None:
        self.encoder = encoder
        count = len(stage_widths(encoder.tower))
        self.stages = list(range(max(count - 1, 1))) if count <= PYRAMID else layout_stages(count)[:-1]
        trunk = getattr(encoder.tower, "trunk", encoder.tower)
        # position embeddings fit one size only; convolutions see the images at their own
        self.fixed_size = hasattr(trunk, "patch_embed") or hasattr(trunk, "transformer")

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distances ``(b,)`` of images ``(b, 3, h, w)`` in [-1, 1]."""
        total = first.new_zeros(len(first), dtype=torch.float32)
        for one, other in zip(self._maps(first), self._maps(second), strict=True):
            squares = (_unit_length(one.float()) - _unit_length(other.float())) ** 2
            total = total + squares.sum(dim=1).mean(dim=(1, 2))
        return total

    def _maps(self, images: Tensor) -> list[Tensor]:
        config = self.encoder.config
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
        pixels = (images * 0.5 + 0.5 - mean) / std
        if self.fixed_size:
            size = (config.image_size, config.image_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        _, maps = tower_stages(self.encoder.tower, pixels)
        return [maps[index] for index in self.stages]


def _unit_length(features: Tensor) -> Tensor:
    """Scale ``(b, c, h, w)`` to length one over the channels.

    The tiny number below the root keeps the gradient finite where no feature is active.
    """
    return features / (torch.sqrt((features**2).sum(dim=1, keepdim=True) + 1e-20) + 1e-10)


def _channel_weights(linear: dict[str, Tensor] | None, index: int, channels: int) -> Tensor:
    if linear is None:
        return torch.full((1, channels, 1, 1), 1.0 / channels)
    weight = linear[f"lin{index}.model.1.weight"].float()
    if weight.shape != (1, channels, 1, 1) or weight.min() < 0:
        raise RuntimeError(f"lin{index}.model.1.weight is no row of {channels} non-negative weights")
    return weight


def load_perceptual(vgg: str, linear: str) -> PerceptualDistance:
    """Build the distance from files of the user's.

    Args:
        vgg: state dict of torchvision's ``vgg16``, as torch or safetensors file.
        linear: weights of LPIPS (``lpips/weights/v0.1/vgg.pth``); empty weighs all channels alike.

    Raises:
        UserError: no path, no such file, an unreadable one, or one that holds other weights.
    """
    if not vgg:
        raise UserError(
            "autoencoder_loss.perceptual_weight needs autoencoder_loss.perceptual_vgg: the file of "
            "torchvision's VGG16 weights (vgg16-397923af.pth)"
        )
    features = _read(vgg, "autoencoder_loss.perceptual_vgg")
    weights = _read(linear, "autoencoder_loss.perceptual_linear") if linear else None
    if "features.0.weight" not in features:
        raise UserError(f"'{vgg}' does not hold torchvision's vgg16: it has no 'features.0.weight'")
    if weights is not None and "lin0.model.1.weight" not in weights:
        raise UserError(f"'{linear}' does not hold LPIPS weights: it has no 'lin0.model.1.weight'")
    try:
        return PerceptualDistance(features, weights)
    except KeyError as error:
        raise UserError(f"'{vgg}' or '{linear}' is incomplete: {error} is missing") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{vgg}' or '{linear}' does not fit VGG16: {reason}") from error


def _read(path: str, key: str) -> dict[str, Tensor]:
    """Return the tensors of a file, without running what a pickle may hold."""
    if not Path(path).is_file():
        raise UserError(f"{key}: no file at '{path}'")
    try:
        safetensors = path.endswith(".safetensors")
        content = load_file(path) if safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except (*UNREADABLE, OSError) as error:
        raise UserError(f"{key}: '{path}' is damaged or no file of weights") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: '{path}' holds no state dict")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        check_finite(name, value, path)
    return tensors
