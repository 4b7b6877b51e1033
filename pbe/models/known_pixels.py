"""The pixels outside the hole, brought to a decoder at each of its resolutions.

The idea is that of Zhu et al. 2023 (Designing a Better Asymmetric VQGAN for StableDiffusion): what is known
of a picture need not be squeezed through the latents. The branch here is this project's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.config import AutoencoderConfig
from pbe.models.layers import zero_init

CHANNELS = 4  # the masked picture and the mask


class KnownPixels(nn.Module):
    """Strided convolutions of picture and mask, and a projection onto the decoder's map of each resolution.

    Nothing has a bias, so that nothing comes of a hole that is everywhere; the projections start at zero,
    so that nothing comes of a fresh branch at all.

    Args:
        config: of the autoencoder.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        mults = config.channel_mult
        widths = [max(config.channels * mult // 4, 4) for mult in mults]
        inputs = [CHANNELS * config.patch**2, *widths[:-1]]
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
    """Return what a mask-aware decoder is told: ``(b, 4, h, w)``, the masked picture and the mask.

    Args:
        images: ``(b, 3, h, w)`` in [-1, 1].
        keep_mask: ``(b, 1, h, w)`` in [0, 1], 1 = keep; what is not kept is not told.
    """
    return torch.cat([images * keep_mask, keep_mask], dim=1)
