"""Small layers shared by the UNet and the autoencoder."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.errors import UserError
from pbe.models.convolution import Convolution, double, is_channels_last

SMALL_MAP, NARROW = 32 * 32, 16
"""Positions and channels of a group from which torch's group norm is fast in any layout."""

L = TypeVar("L", nn.Conv2d, nn.Linear)


def compile_network(network: nn.Module, switch: str) -> None:
    """Compile a network by ``torch.compile``, at its first call; ``switch`` is what asked for it.

    Raises UserError where code is to be made for the CPU, and the compiler that torch would call is missing.
    """
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if not torch.cuda.is_available() and shutil.which(compiler.partition(" ")[0]) is None:
        raise UserError(
            f"{switch} needs a C++ compiler, and there is no '{compiler}'; install g++ (or name another "
            f"compiler in CXX), or leave {switch} out"
        )
    network.compile()


def zero_init(module: L) -> L:
    """Set weight and bias of a layer to zero, so that what it adds starts as nothing."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding with the cosines first (the order that Stable Diffusion's weights expect).

    Args:
        timesteps: ``(b,)`` integers or floats in 0..999.
        dim: size of the embedding, even.
        max_period: longest period, in steps over 2 pi.

    Returns:
        ``(b, dim)`` float32: ``[cos(t f_k), sin(t f_k)]`` with ``f_k = max_period^(-k / (dim / 2))``.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    frequencies = torch.exp(-math.log(max_period) * exponents)
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of a map, with a scale and a shift for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """Group norm, with small maps and narrow groups on a CPU normalised one channel after the other.

    Where channels lie side by side, torch goes through such a group in steps of a few numbers: ten times
    slower than two copies in the other order.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to the same shape."""
        small = x.shape[2] * x.shape[3] < SMALL_MAP and x.shape[1] < NARROW * self.num_groups
        if x.device.type == "cpu" and small and is_channels_last(x):
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def make_norm(channels: int, groups: int, eps: float = 1e-5) -> GroupNorm | ChannelNorm:
    """Return a group norm, or with no ``groups`` a norm over the channels of each position."""
    return GroupNorm(groups, channels, eps=eps) if groups else ChannelNorm(channels, eps=eps)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual connection and, optionally, a time embedding.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; a 1x1 convolution adapts the residual when they differ.
        groups: groups of the group norms; 0: norms over the channels of each position.
        eps: of the norms (1e-5 in the UNet, 1e-6 in the autoencoder).
        time_dim: size of the time embedding; 0 for a block without one.
        modulation: whether the embedding scales and shifts what the second norm gives (Dhariwal and Nichol
            2021, section 3.1, adaptive group norm) instead of being added before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        time_dim: int = 0,
        modulation: bool = False,
    ) -> None:
        super().__init__()
        self.modulation = modulation
        self.norm1 = make_norm(in_channels, groups, eps)
        self.conv1 = Convolution(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_dim, out_channels * (1 + modulation)) if time_dim else None
        self.norm2 = make_norm(out_channels, groups, eps)
        self.conv2 = Convolution(out_channels, out_channels, 3, padding=1)
        if time_dim:  # the UNet starts every residual branch at zero, the autoencoder does not
            zero_init(self.conv2)
        self.skip = Convolution(in_channels, out_channels, 1) if in_channels != out_channels else None

    def embed(self, time: Tensor) -> Tensor:
        """Map time embeddings ``(n, time_dim)`` to what this block adds, or scales and shifts with."""
        assert self.time_proj is not None
        return self.time_proj(F.silu(time))

    def forward(self, x: Tensor, time: Tensor | Mapping[nn.Module, Tensor] | None = None) -> Tensor:
        """Map ``(b, in, h, w)`` to ``(b, out, h, w)``.

        Args:
            x: the map.
            time: ``(b, time_dim)``, or what :meth:`embed` made of it, for each block; one row may serve all
                samples.
        """
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_proj is None:
            h = self.norm2(h)
        else:
            assert time is not None
            embedding = (self.embed(time) if isinstance(time, Tensor) else time[self])[:, :, None, None]
            if self.modulation:
                scale, shift = embedding.chunk(2, dim=1)
                h = torch.addcmul(shift, self.norm2(h), 1.0 + scale)
            else:
                h = self.norm2(h + embedding)
        h = self.conv2(F.silu(h))
        return h + (x if self.skip is None else self.skip(x))


class Upsample(nn.Module):
    """Nearest-neighbour doubling followed by a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map ``(b, c, h, w)`` to ``(b, c, 2h, 2w)``, or to a ``size`` without its last row or column."""
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv.of_doubled(x)
        x = double(x)
        return self.conv(x[:, :, : size[0], : size[1]])


class Downsample(nn.Module):
    """3x3 convolution of stride two.

    ``asymmetric`` pads right and bottom only, as Stable Diffusion's autoencoder does; otherwise one
    pixel is padded on every side, as in its UNet.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to ``(b, c, h / 2, w / 2)``."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
