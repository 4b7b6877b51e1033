"""Learned pooling that knows positions: one token made of the maps of the image tower's stages.

CLIP's class token is an attention pool with positions, so it knows where things are in the exemplar. The
global average of a convolutional tower does not. Here the maps of four stages, averaged to a coarse grid, are
read position by position and flattened into the one token of the bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

PYRAMID = 5
"""Stages that a convolutional tower has at most; what has more of them is a transformer with its blocks."""


def tower_stages(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the pooled feature of a tower and the maps of its stages.

    Args:
        tower: as :func:`pbe.models.tower.build_tower` makes it; it must be able to give its stages
            (``forward_intermediates``), which timm's and open_clip's can.
        pixels: ``(b, 3, s, s)`` normalised.

    Returns:
        The pooled feature ``(b, width)``, and one ``(b, c, h, w)`` for each stage of a convolutional tower or
        each block of a transformer, from the first one up.
    """
    trunk: Any = getattr(tower, "trunk", None)
    if trunk is not None:
        last, maps = trunk.forward_intermediates(pixels)
        return trunk.forward_head(last, pre_logits=True), maps
    output = tower.forward_intermediates(pixels)  # type: ignore[operator]
    return output["image_features"], output["image_intermediates"]


def stage_widths(tower: nn.Module) -> list[int]:
    """Return the channels of the maps of :func:`tower_stages`."""
    trunk: Any = getattr(tower, "trunk", None)
    if trunk is not None:
        return [int(stage["num_chs"]) for stage in trunk.feature_info]
    network: Any = tower
    if hasattr(network, "layer4"):  # a ResNet of CLIP: its stem and four stages
        stages = [network.layer1, network.layer2, network.layer3, network.layer4]
        return [int(network.conv3.out_channels), *(int(stage[-1].conv3.out_channels) for stage in stages)]
    return [int(network.conv1.out_channels)] * len(network.transformer.resblocks)


def layout_stages(count: int) -> list[int]:
    """Return which of a tower's ``count`` stages a layout is read from.

    The first and the last three of a pyramid (colour and edges, then shapes); the ends of the four quarters
    of a transformer's blocks.
    """
    if count <= PYRAMID:
        return sorted({0, *range(max(count - 3, 0), count)})
    return [quarter * count // 4 - 1 for quarter in (1, 2, 3, 4)]


def layout_features(maps: list[Tensor], grid: int) -> Tensor:
    """Average the maps of :func:`layout_stages` to a grid: ``(b, grid * grid * channels)``.

    Positions run row by row, each with the channels of all stages. Coarser maps are repeated.
    """
    chosen = [F.adaptive_avg_pool2d(maps[index], grid) for index in layout_stages(len(maps))]
    return rearrange(torch.cat(chosen, dim=1), "b c h w -> b (h w c)")


class LayoutPooling(nn.Module):
    """One token from the coarse maps: a linear layer at each position, GELU, a linear map of all positions.

    Args:
        channels: of all chosen stages together.
        grid: positions along a side.
        hidden: channels that each position is brought to.
        width: of the token.
    """

    def __init__(self, channels: int, grid: int, hidden: int, width: int) -> None:
        super().__init__()
        self.positions = grid * grid
        self.features = self.positions * channels
        self.read = nn.Linear(channels, hidden)
        self.gather = nn.Linear(self.positions * hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(b, 1, positions * channels)`` to ``(b, 1, width)``."""
        maps = rearrange(features, "b n (p c) -> b n p c", p=self.positions)
        return self.gather(rearrange(F.gelu(self.read(maps)), "b n p c -> b n (p c)"))
