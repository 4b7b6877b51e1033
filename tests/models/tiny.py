"""Tiny configurations and weights that are nowhere zero, shared by the tests of the networks."""

from __future__ import annotations

import torch
from torch import nn

from pbe.config import AutoencoderConfig, ExemplarEncoderConfig, ModelConfig, UNetConfig

CONV_TOWER = "timm/test_efficientnet"
TRANSFORMER_TOWER = "timm/test_vit"


def tiny_unet_config() -> UNetConfig:
    return UNetConfig(
        model_channels=16,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_factors=[1, 2],
        num_heads=2,
        context_dim=24,
        norm_groups=8,
    )


def tiny_autoencoder_config() -> AutoencoderConfig:
    return AutoencoderConfig(
        channels=16, channel_mult=[1, 2], num_res_blocks=1, latent_channels=4, norm_groups=8, scale_factor=0.5
    )


def tiny_encoder_config(
    tower: str = CONV_TOWER, *, tokens: str = "class", width: int = 32
) -> ExemplarEncoderConfig:
    return ExemplarEncoderConfig(
        tower=tower, image_size=64, tokens=tokens, mapper_width=width, mapper_layers=2, mapper_heads=2
    )


def tiny_model_config() -> ModelConfig:
    return ModelConfig(
        image_size=32,
        unet=tiny_unet_config(),
        autoencoder=tiny_autoencoder_config(),
        exemplar_encoder=tiny_encoder_config(),
    )


def randomised(module: nn.Module, std: float = 0.15) -> nn.Module:
    """Draw every parameter anew, so that no branch starts at zero, and switch to evaluation."""
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())
