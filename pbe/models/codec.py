"""Encoder and decoder of the autoencoder and the Gaussian between them (Rombach et al. 2022, section 3.1).

A decoder may also be told the pixels outside the mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.config import AutoencoderConfig
from pbe.models.attention import SlicedAttention
from pbe.models.layers import Downsample, ResBlock, Upsample, zero_init

EPS = 1e-6
KNOWN_CHANNELS = 4  # the masked image and the mask


class Posterior(NamedTuple):
    """Diagonal Gaussian over unscaled latents; both ``(b, z, h, w)``."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return ``mean + std * noise`` for standard normal ``noise`` of the same shape."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Return the divergence to the standard normal per element, ``(b, z, h, w)``."""
        variance = self.std**2
        return 0.5 * (self.mean**2 + variance - 1.0 - torch.log(variance))


class SpatialAttention(SlicedAttention):
    """Single-head self-attention over positions, by 1x1 convolutions, residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to the same shape."""
        h = self.norm(x)
        # fused kernels, which never hold the (h w) x (h w) weights, want channels next to each other
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c").contiguous() for f in (self.q, self.k, self.v))
        out = self.attend(q, k, v)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]).contiguous())


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.block1 = _block(channels, channels, config)
        self.attention = SpatialAttention(channels, config.norm_groups) if config.mid_attention else None
        self.block2 = _block(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to the same shape."""
        x = self.block1(x)
        return self.block2(x if self.attention is None else self.attention(x))


def _block(in_channels: int, out_channels: int, config: AutoencoderConfig) -> ResBlock:
    return ResBlock(in_channels, out_channels, groups=config.norm_groups, eps=EPS)


class CodecLevel(nn.Module):
    """Residual blocks of one resolution and the change to the next; ``resample`` is None at the end."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        count: int,
        config: AutoencoderConfig,
        resample: Downsample | Upsample | None,
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (count - 1)
        self.blocks = nn.ModuleList(_block(channels, out_channels, config) for channels in inputs)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks, then the change of resolution."""
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nn.Module):
    """Folded image ``(b, 3 p p, h, w)`` to moments ``(b, 2z, h / f, w / f)``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        channels = config.channels
        for depth, width in enumerate(widths):
            resample = Downsample(width, asymmetric=True) if depth < len(widths) - 1 else None
            self.levels.append(CodecLevel(channels, width, config.num_res_blocks, config, resample))
            channels = width
        self.mid = Middle(channels, config)
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, 3 p p, h, w)`` in [-1, 1] to ``(b, 2z, h / f, w / f)``."""
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class KnownPixels(nn.Module):
    """The pixels outside the mask, brought to a decoder at each of its resolutions.

    The idea is that of Zhu et al. 2023 (Designing a Better Asymmetric VQGAN for StableDiffusion): known
    pixels need not be squeezed through the latents. The branch here is this project's own: strided
    convolutions of image and mask, and a projection onto the decoder's map of each resolution. Nothing has
    a bias, so that a mask over everything adds nothing; the projections start at zero, so that a fresh
    branch adds nothing.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        mults = config.channel_mult
        widths = [max(config.channels * mult // 4, 4) for mult in mults]
        inputs = [KNOWN_CHANNELS * config.patch**2, *widths[:-1]]
        # what a level of the decoder takes is as wide as the level below gives
        outputs = [config.channels * mult for mult in (*mults[1:], mults[-1])]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, width, 3, stride=2 if depth else 1, padding=1, bias=False)
            for depth, (channels, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.projections = nn.ModuleList(
            zero_init(nn.Conv2d(width, output, 1, bias=False))
            for width, output in zip(widths, outputs, strict=True)
        )

    def forward(self, known: Tensor) -> list[Tensor]:
        """Map ``(b, 4 p p, h, w)`` to features at full (folded) size, half of it, a quarter, and so on."""
        features: list[Tensor] = []
        for conv in self.convs:
            known = F.silu(conv(known))
            features.append(known)
        return features

    def add(self, x: Tensor, feature: Tensor, depth: int) -> Tensor:
        """Return a map of the decoder, ``2**depth`` pixels a position, with what is known there."""
        return x + self.projections[depth](feature)


def known_pixels(images: Tensor, keep_mask: Tensor) -> Tensor:
    """Return what a mask-aware decoder is told: ``(b, 4, h, w)``, the masked image and the mask.

    Args:
        images: ``(b, 3, h, w)`` in [-1, 1].
        keep_mask: ``(b, 1, h, w)`` in [0, 1], 1 = keep; what is not kept is not told.
    """
    return torch.cat([images * keep_mask, keep_mask], dim=1)


class Decoder(nn.Module):
    """Latents ``(b, z, h, w)`` to a folded image ``(b, 3 p p, f h, f w)``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = Middle(channels, config)
        self.levels = nn.ModuleList()
        for depth in reversed(range(len(widths))):
            resample = Upsample(widths[depth]) if depth else None
            self.levels.append(
                CodecLevel(channels, widths[depth], config.num_res_blocks + 1, config, resample)
            )
            channels = widths[depth]
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=EPS)
        self.conv_out = nn.Conv2d(channels, 3 * config.patch**2, 3, padding=1)
        self.known = KnownPixels(config) if config.mask_aware_decoder else None

    def forward(self, z: Tensor, known: Tensor | None = None) -> Tensor:
        """Map ``(b, z, h, w)`` and known pixels ``(b, 4 p p, f h, f w)`` to ``(b, 3 p p, f h, f w)``."""
        features = None if known is None or self.known is None else self.known(known)
        x = self.mid(self.conv_in(z))
        for depth, level in zip(reversed(range(len(self.levels))), self.levels, strict=True):
            if self.known is not None and features is not None:
                x = self.known.add(x, features[depth], depth)
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
