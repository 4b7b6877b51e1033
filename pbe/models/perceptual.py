"""Perceptual distances of images: LPIPS (Zhang et al. 2018), and the same on an image tower."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from pbe.models.exemplar_encoder import PYRAMID, ExemplarEncoder, layout_stages
from pbe.models.image_tower import stage_widths, tower_stages

# Where torchvision's VGG16 has done the last ReLU before each pooling, and the channels there.
ENDS = (4, 9, 16, 23, 30)
CHANNELS = (64, 128, 256, 512, 512)
# LPIPS brings images in [-1, 1] to what torchvision's VGG16 was trained on with these.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


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
        """Return the distances ``(b,)`` of images ``(b, 3, h, w)`` in [-1, 1], with sides of 16 or more."""
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
        raise RuntimeError(f"lin{index}.model.1.weight is not a row of {channels} non-negative weights")
    return weight
