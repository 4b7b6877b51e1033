"""A small model with CLIP's kind of tower, which every layout can hold, and files made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbe.checkpoints.compvis.format import derived_buffers, original_weights
from pbe.checkpoints.tensors import lazies
from pbe.config import AutoencoderConfig, ExemplarEncoderConfig, ModelConfig, UNetConfig
from pbe.models import LatentDiffusion
from tests.models.tiny import randomised

OFFICIAL_HASH = "ce11c21eda869f5482ab5fba9003f2ac0fdaa480db520d050145ae60685b4b79"


def small_config() -> ModelConfig:
    return ModelConfig(
        image_size=32,
        unet=UNetConfig(
            model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_factors=[1], num_heads=4,
            context_dim=24,
        ),
        autoencoder=AutoencoderConfig(channels=32, channel_mult=[1, 1], num_res_blocks=1),
        exemplar_encoder=ExemplarEncoderConfig(
            tower="vit/32x4-patch16-heads4-mlp48-quickgelu", image_size=32, mapper_layers=1
        ),
    )  # fmt: skip


def small_model(config: ModelConfig | None = None) -> LatentDiffusion:
    model = randomised(LatentDiffusion(config or small_config()), std=0.05)
    return model.requires_grad_(False)  # type: ignore[return-value]


def original_state(model: LatentDiffusion) -> dict[str, Tensor]:
    """The state dict of the original's checkpoint, with everything that stands in one."""
    native = lazies(model.state_dict())
    state = original_weights(model.config, native) | derived_buffers(model.config, native)
    return {key: value.read().clone() for key, value in state.items()}


def save_original(path: Path, model: LatentDiffusion, **rest: Any) -> Path:
    """Write a checkpoint as torch does."""
    torch.save({"state_dict": original_state(model), **rest}, path)
    return path


def same_weights(model: LatentDiffusion, expected: LatentDiffusion) -> bool:
    found, wanted = model.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    return all(torch.equal(found[key], wanted[key]) for key in wanted)


def with_unet(**changes: Any) -> ModelConfig:
    config = small_config()
    return replace(config, unet=replace(config.unet, **changes))
