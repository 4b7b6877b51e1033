"""AutoencoderKL: images to a Gaussian over latents and back (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.config import AutoencoderConfig
from pbe.models.codec import Decoder, Encoder, KnownPixels, Posterior
from pbe.models.tiling import decode_in_bands, encode_in_bands


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
        tile_above: images with a side of more pixels than this are encoded and decoded in bands wherever
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
        """Give the decoder a fresh branch for the pixels outside the mask, which changes nothing yet."""
        self.config = replace(self.config, mask_aware_decoder=True)
        self.decoder.known = KnownPixels(self.config)

    def decode(self, latents: Tensor, known: Tensor | None = None) -> Tensor:
        """Return images ``(b, 3, h, w)``, about [-1, 1] but not clamped, of unscaled latents.

        Args:
            latents: ``(b, z, h / f, w / f)``.
            known: :func:`pbe.models.codec.known_pixels` ``(b, 4, h, w)``, which only a mask-aware
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
