"""The latent diffusion model: autoencoder, exemplar encoder and UNet behind one small interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.config import ModelConfig
from pbe.models.autoencoder import AutoencoderKL
from pbe.models.exemplar_encoder import ExemplarEncoder
from pbe.models.unet import DeepFeatures, Prepared, UNet


class LatentDiffusion(nn.Module):
    """All networks of Paint by Example, and the conversions between pixels and their inputs.

    Args:
        config: sizes of all parts, prediction and schedule.
        unet: a network to use instead of building one, for example to share it with another model.
        autoencoder: likewise.
        exemplar_encoder: likewise.

    Attributes:
        before_use: called with ``unet``, ``autoencoder`` or ``exemplar_encoder`` before that part runs.
        run_on: where the parts run if their weights may be elsewhere; None: where the UNet's weights are.
    """

    before_use: Callable[[str], None] | None = None
    run_on: torch.device | None = None

    def __init__(
        self,
        config: ModelConfig,
        *,
        unet: UNet | None = None,
        autoencoder: AutoencoderKL | None = None,
        exemplar_encoder: ExemplarEncoder | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.unet = unet or UNet(config.unet, config.autoencoder.latent_channels)
        self.autoencoder = autoencoder or AutoencoderKL(config.autoencoder)
        self.exemplar_encoder = exemplar_encoder or ExemplarEncoder(
            config.exemplar_encoder, config.unet.context_dim
        )

    @property
    def device(self) -> torch.device:
        """Device of inputs and outputs."""
        return self.run_on or self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the UNet's weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Type of the weights of autoencoder and tower; differs from the UNet's when adapters are trained."""
        return next(self.autoencoder.parameters()).dtype

    @property
    def size_multiple(self) -> int:
        """Height and width of images must be multiples of this many pixels."""
        return self.autoencoder.downsampling

    @property
    def tile_above(self) -> int | None:
        """Images with a longer side than this, in pixels, are encoded and decoded in bands; None: never."""
        return self.autoencoder.tile_above

    @tile_above.setter
    def tile_above(self, pixels: int | None) -> None:
        """Set it for the autoencoder, and thus for every model that shares it."""
        self.autoencoder.tile_above = pixels

    def _use(self, part: str) -> None:
        if self.before_use is not None:
            self.before_use(part)

    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents ``(b, z, h, w)`` of images ``(b, 3, H, W)`` in [-1, 1].

        Args:
            images: images to encode.
            noise: standard normal ``(b, z, h, w)`` to sample the posterior with; None takes its mean.
        """
        self._use("autoencoder")
        posterior = self.autoencoder.encode(images)
        latents = posterior.mean if noise is None else posterior.sample(noise)
        return latents * self.config.autoencoder.scale_factor

    def decode_latents(self, latents: Tensor, known: Tensor | None = None) -> Tensor:
        """Return images ``(b, 3, H, W)``, about [-1, 1] but not clamped, of scaled latents.

        Args:
            latents: ``(b, z, h, w)``.
            known: as :meth:`pbe.models.autoencoder.AutoencoderKL.decode` takes it.
        """
        self._use("autoencoder")
        return self.autoencoder.decode(latents / self.config.autoencoder.scale_factor, known)

    def normalise_exemplar(self, exemplar: Tensor) -> Tensor:
        """Normalise exemplars ``(b, 3, s, s)``, uint8 or float in [0, 1], as the tower expects it."""
        pixels = exemplar.to(self.device)
        pixels = pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels.float()
        mean, std = (
            torch.tensor(values, device=pixels.device).view(1, 3, 1, 1)
            for values in (self.config.exemplar_encoder.mean, self.config.exemplar_encoder.std)
        )
        return ((pixels - mean) / std).to(self.frozen_dtype)

    def encode_exemplar(self, pixels: Tensor) -> Tensor:
        """Map normalised exemplars ``(b, 3, s, s)`` to the condition ``(b, tokens, context_dim)``."""
        self._use("exemplar_encoder")
        return self.exemplar_encoder(pixels)

    def null_condition(self, batch: int, tokens: int = 1) -> Tensor:
        """Return the learned null condition, repeated to ``(batch, tokens, context_dim)``."""
        return self.exemplar_encoder.null_condition.to(self.device).expand(batch, tokens, -1)

    def predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        condition: Tensor,
        masked_latents: Tensor,
        keep_mask: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Run the UNet on ``[noisy latents | masked-image latents | mask]``.

        Args:
            x_t: ``(b, z, h, w)`` noisy latents.
            timesteps: ``(b,)`` integers in 0..999.
            condition: ``(b, tokens, context_dim)``.
            masked_latents: ``(b, z, h, w)`` scaled latents of the image with the masked region at mid-grey.
            keep_mask: ``(b, 1, h, w)``, 1 = keep, 0 = masked region.
            guidance: ``(b,)`` guidance scales, for a UNet with that input.

        Returns:
            ``(b, z, h, w)``: the noise, or v, as ``config.prediction`` says.
        """
        self._use("unet")
        x = torch.cat([x_t, masked_latents, keep_mask], dim=1)
        return self.unet(x, timesteps, condition, guidance=guidance)

    def prepare(
        self,
        condition: Tensor,
        masked_latents: Tensor,
        keep_mask: Tensor,
        timesteps: Tensor,
        guidance: Tensor | None = None,
    ) -> Prepared:
        """Compute once what is the same in all calls of an edit; arguments as :meth:`UNet.prepare`."""
        self._use("unet")
        return self.unet.prepare(condition, masked_latents, keep_mask, timesteps, guidance)

    def predict_prepared(
        self, x_t: Tensor, timesteps: Tensor, prepared: Prepared, deep: DeepFeatures | None = None
    ) -> Tensor:
        """Do what :meth:`predict` does for k conditions; ``x_t`` is ``(k b, z, h, w)``, the same k times."""
        self._use("unet")
        return self.unet(x_t, timesteps, prepared, deep)


def masked_image(images: Tensor, keep_mask: Tensor) -> Tensor:
    """Return the images with the masked region at 0, mid-grey: ``images * keep_mask``.

    Args:
        images: ``(b, 3, h, w)`` in [-1, 1].
        keep_mask: ``(b, 1, h, w)`` in [0, 1], 1 = keep.
    """
    return images * keep_mask


def latent_mask(keep_mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a keep mask ``(b, 1, H, W)`` to the latent ``size``: bilinear without antialias.

    This is the original's resize (the mean of the central 2x2 of each 8x8 block).
    """
    return F.interpolate(keep_mask, size=size, mode="bilinear", align_corners=False, antialias=False)
