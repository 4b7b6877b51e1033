"""A model small enough to edit in a fraction of a second, with random weights everywhere."""

from __future__ import annotations

import torch

from pbe.config import AutoencoderConfig, ExemplarEncoderConfig, ModelConfig, UNetConfig
from pbe.models import LatentDiffusion

IMAGE_SIZE = 32


def make_tiny_model(prediction: str = "eps", seed: int = 0) -> LatentDiffusion:
    """Return a model for 32 px images: 4x4 px a latent, sides in multiples of 8 px."""
    torch.manual_seed(seed)
    model = LatentDiffusion(
        ModelConfig(
            image_size=IMAGE_SIZE,
            prediction=prediction,
            unet=UNetConfig(
                model_channels=16,
                channel_mult=[1, 2],
                num_res_blocks=1,
                attention_factors=[2],
                num_heads=2,
                context_dim=16,
                norm_groups=8,
            ),
            autoencoder=AutoencoderConfig(
                channels=16,
                channel_mult=[1, 1, 2],
                num_res_blocks=1,
                norm_groups=8,
                mid_attention=False,
                scale_factor=1.0,
            ),
            exemplar_encoder=ExemplarEncoderConfig(
                tower="timm/test_efficientnet",
                image_size=IMAGE_SIZE,
                mapper_width=16,
                mapper_layers=1,
                mapper_mlp_ratio=2,
            ),
        )
    )
    with torch.no_grad():  # layers that start at zero would hide the mask, the exemplar and the guidance
        for parameter in model.unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model.eval().requires_grad_(False)
