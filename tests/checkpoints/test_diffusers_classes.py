"""Folders that diffusers' own classes wrote and read: the same numbers on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from torch import nn
from transformers import CLIPVisionConfig

from pbe.checkpoints.loading import load_checkpoint
from pbe.checkpoints.saving import save_checkpoint
from pbe.models import LatentDiffusion
from tests.checkpoints.small import same_weights, small_config, small_model
from tests.models.tiny import randomised, relative

TIGHT = 1e-5
LEVELS = 3


def unet() -> UNet2DConditionModel:
    """Levels with and without transformers on both sides, changes of width, two blocks a level."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=9,
        out_channels=4,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=20,
        norm_num_groups=16,
    )


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        latent_channels=4,
        scaling_factor=0.3,
    )


def image_encoder(activation: str) -> PaintByExampleImageEncoder:
    return PaintByExampleImageEncoder(
        CLIPVisionConfig(
            hidden_size=36,
            intermediate_size=50,
            num_hidden_layers=10,
            num_attention_heads=3,
            image_size=24,
            patch_size=8,
            projection_dim=20,
            hidden_act=activation,
        )
    )


def write(folder: Path, activation: str, **options: Any) -> dict[str, nn.Module]:
    parts = {"unet": unet(), "vae": autoencoder(), "image_encoder": image_encoder(activation)}
    for name, part in parts.items():
        randomised(part, std=0.05)
        part.save_pretrained(folder / name, **options)
    PNDMScheduler(
        skip_prk_steps=True, steps_offset=1, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(folder / "scheduler")
    return parts


@torch.no_grad()
def compare(model: LatentDiffusion, parts: dict[str, nn.Module]) -> None:
    """Run every network on both sides, the UNet with one token and with several."""
    for tokens in (1, 3):
        x, context = torch.randn(2, 9, 8, 8), torch.randn(2, tokens, model.config.unet.context_dim)
        timesteps = torch.tensor([3, 977])
        expected = parts["unet"](x, timesteps, encoder_hidden_states=context).sample
        assert relative(model.unet(x, timesteps, context), expected) < TIGHT
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    latents = parts["vae"].encode(images).latent_dist.mean  # type: ignore[operator]
    assert relative(model.encode_images(images), latents * model.config.autoencoder.scale_factor) < TIGHT
    assert relative(model.autoencoder.decode(latents), parts["vae"].decode(latents).sample) < TIGHT  # type: ignore[operator]
    side = model.config.exemplar_encoder.image_size
    pixels = torch.randn(2, 3, side, side)
    condition, null = parts["image_encoder"](pixels, return_uncond_vector=True)
    assert relative(model.encode_exemplar(pixels), condition) < TIGHT
    assert torch.equal(model.null_condition(1), null)


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("quick_gelu", {}),
        ("gelu", {"max_shard_size": "100KB"}),
        ("quick_gelu", {"safe_serialization": False}),
    ],
    ids=["safetensors", "shards", "pickles"],
)
def test_what_diffusers_writes_is_read(tmp_path: Path, activation: str, options: dict[str, Any]) -> None:
    parts = write(tmp_path, activation, **options)
    loaded = load_checkpoint(tmp_path)
    assert loaded.layout == "diffusers"
    assert loaded.model.config.image_size == 8 * 4
    if "max_shard_size" in options:
        assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    compare(loaded.model, parts)


def test_what_is_written_diffusers_reads(tmp_path: Path) -> None:
    model = small_model()
    save_checkpoint(tmp_path, model, "diffusers")
    parts: dict[str, nn.Module] = {}
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        parts[name], info = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values()), (name, info)
    parts["image_encoder"], info = PaintByExampleImageEncoder.from_pretrained(
        tmp_path / "image_encoder", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    compare(model, {name: part.eval() for name, part in parts.items()})
    scheduler = PNDMScheduler.from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.skip_prk_steps
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "PaintByExamplePipeline"
    for name, part in parts.items():
        part.save_pretrained(tmp_path / "again" / name)  # type: ignore[operator]
    assert same_weights(load_checkpoint(tmp_path / "again").model, model)
    assert load_checkpoint(tmp_path / "again").model.config.unet == small_config().unet
