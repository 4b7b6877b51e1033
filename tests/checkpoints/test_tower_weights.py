"""Weights of an image tower from files: its own, all of CLIP's, and TorchScript programs that do not run."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pbe.checkpoints import readers
from pbe.checkpoints.key_map import check_finite
from pbe.checkpoints.loading import load_checkpoint
from pbe.checkpoints.readers import is_program, open_weights
from pbe.checkpoints.tower_weights import load_tower_weights, read_state
from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.tower import build_tower
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
    monkeypatch.setattr(readers, "MAX_MODULES", 100)
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
        ({"conv1.weight": torch.ones(2)}, "0 tensors missing, 0 unknown, 1 of another shape"),
        ({"stranger": torch.ones(2)}, "0 tensors missing, 1 unknown, 0 of another shape, such as 'stranger'"),
    ):
        torch.save(state | change, config.pretrained)
        with pytest.raises(UserError, match=message):
            loaded(config)
    torch.save({"a": print}, config.pretrained)
    with pytest.raises(UserError, match="there is no state dict in it"):
        loaded(config)
