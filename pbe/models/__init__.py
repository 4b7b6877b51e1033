"""The networks: UNet, autoencoder, exemplar encoder, and the latent diffusion model that joins them."""

from pbe.models.autoencoder import AutoencoderKL
from pbe.models.exemplar_encoder import ExemplarEncoder
from pbe.models.latent_diffusion import LatentDiffusion
from pbe.models.unet import UNet

__all__ = ["AutoencoderKL", "ExemplarEncoder", "LatentDiffusion", "UNet"]
