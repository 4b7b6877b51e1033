"""AutoencoderKL: pictures to a Gaussian over latents and back (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.config import AutoencoderConfig
from pbe.models.attention import SlicedAttention
from pbe.models.known_pixels import KnownPixels
from pbe.models.layers import Downsample, ResBlock, Upsample
from pbe.models.tiling import decode_in_bands, encode_in_bands

EPS = 1e-6


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


def downsampling_of(config: AutoencoderConfig) -> int:
    """Return the pixels per latent position along a side."""
    return int(config.patch * 2 ** (len(config.channel_mult) - 1))


def _patch_maps(config: AutoencoderConfig) -> tuple[nn.Conv2d, nn.ConvTranspose2d]:
    """Return linear maps from whole patches to latent means and back, as strided convolutions."""
    factor, z = downsampling_of(config), config.latent_channels
    encoder = nn.Conv2d(3, z, factor, stride=factor)
    return encoder, nn.ConvTranspose2d(z, 3, factor, stride=factor)


class AutoencoderKL(nn.Module):
    """Autoencoder with a Gaussian bottleneck. Latents here are unscaled; see ``LatentDiffusion``.

    Attributes:
        tile_above: pictures with a side of more pixels than this are encoded and decoded in bands wherever
            no gradient is asked for: same numbers, less memory (:mod:`pbe.models.tiling`). None: never.
    """

    tile_above: int | None = 1024

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = Decoder(config)
        self.patch_encoder: nn.Conv2d | None = None
        self.patch_decoder: nn.ConvTranspose2d | None = None
        if config.patch_shortcut:
            self.patch_encoder, self.patch_decoder = _patch_maps(config)

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along a side."""
        return downsampling_of(self.config)

    def encode(self, images: Tensor) -> Posterior:
        """Return the posterior of ``(b, 3, h, w)`` in [-1, 1]; h and w multiples of ``downsampling``."""
        folded, tiles = self._folded(images), self._tiles(images, 1)
        moments = encode_in_bands(self.encoder, folded) if tiles else self.encoder(folded)
        mean, log_variance = self.quant_conv(moments).chunk(2, dim=1)
        if self.patch_encoder is not None:
            mean = mean + self.patch_encoder(images)
        return Posterior(mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)))

    def make_mask_aware(self) -> None:
        """Give the decoder a fresh branch for the pixels outside the hole, which changes nothing yet."""
        self.config = replace(self.config, mask_aware_decoder=True)
        self.decoder.known = KnownPixels(self.config)

    def decode(self, latents: Tensor, known: Tensor | None = None) -> Tensor:
        """Return pictures ``(b, 3, h, w)``, about [-1, 1] but not clamped, of unscaled latents.

        Args:
            latents: ``(b, z, h / f, w / f)``.
            known: :func:`pbe.models.known_pixels.known_pixels` ``(b, 4, h, w)``, which only a mask-aware
                decoder looks at; None: nothing is known.
        """
        z = self.post_quant_conv(latents)
        tiles = self._tiles(latents, self.downsampling)
        known = known if known is None else self._folded(known)
        images = decode_in_bands(self.decoder, z, known) if tiles else self.decoder(z, known)
        if self.config.patch > 1:
            images = F.pixel_shuffle(images, self.config.patch)
        return images if self.patch_decoder is None else images + self.patch_decoder(latents)

    def _folded(self, pixels: Tensor) -> Tensor:
        """Fold ``(b, c, p h, p w)`` to ``(b, c p p, h, w)``."""
        return F.pixel_unshuffle(pixels, self.config.patch) if self.config.patch > 1 else pixels

    def _tiles(self, x: Tensor, pixels: int) -> bool:
        """Return whether to work in bands on ``(b, c, h, w)`` with ``pixels`` a position along a side."""
        wanted = self.tile_above is not None and max(x.shape[2:]) * pixels > self.tile_above
        return wanted and not torch.is_grad_enabled()
