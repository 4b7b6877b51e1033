"""Pickles: tensors come through, whatever else is in them does not run."""

from __future__ import annotations

import argparse
import builtins
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from pbe.checkpoints.loading import load_checkpoint
from pbe.checkpoints.weight_files import open_weights
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from tests.checkpoints.small import same_weights, save_original, small_config

ran: list[str] = []


def harmless_looking(text: str) -> None:
    """What a payload would call that no list of dangerous names can know."""
    ran.append(text)


class Payload:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


PAYLOADS = {
    "system": lambda marker: Payload(os.system, f"touch {marker}"),
    "eval": lambda marker: Payload(eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: Payload(exec, f"open({str(marker)!r}, 'w')"),
    "open": lambda marker: Payload(open, str(marker), "w"),
    "popen": lambda marker: Payload(subprocess.Popen, ["touch", str(marker)]),
    "import": lambda marker: Payload(builtins.__import__, "antigravity"),
}


@pytest.mark.parametrize("place", ["beside", "instead", "value"])
@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_crafted_payload_does_not_run(tmp_path: Path, kind: str, place: str) -> None:
    marker, path = tmp_path / "it_ran", tmp_path / "model.ckpt"
    payload = PAYLOADS[kind](marker)
    content: dict[str, Any] = {
        "beside": {"state_dict": {"w": torch.ones(2)}, "callbacks": payload},
        "instead": {"state_dict": payload},
        "value": {"state_dict": {"w": payload}},
    }[place]
    torch.save(content, path)
    with pytest.raises(
        UserError, match=r"model\.ckpt: refused, and nothing of it was run: it asks for '\S+'"
    ):
        open_weights(path)
    assert not marker.exists()
    with pytest.raises(UserError, match="refused"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"state_dict": Payload(harmless_looking, "x")}, "no weights where they should be but an object of"),
        ({"state_dict": {"v": Payload(harmless_looking, "x")}}, "no state dict"),
        ({"state_dict": {}}, "no state dict"),
        ([torch.ones(2)], "no state dict"),
        (Payload(harmless_looking, "x"), "an object of"),
    ],
)
def test_an_unknown_function_is_not_called(tmp_path: Path, content: object, match: str) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=match):
        open_weights(tmp_path / "model.ckpt")
    assert ran == []


def test_what_the_reader_hands_out_cannot_be_changed_for_the_next_file(tmp_path: Path) -> None:
    """A pickle may set attributes of whatever it gets hold of; the next file must not meet them."""
    evil = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__K\x01sb."
    with zipfile.ZipFile(tmp_path / "evil.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", evil)
    with pytest.raises(UserError):
        open_weights(tmp_path / "evil.ckpt")
    torch.save({"w": torch.arange(3.0)}, tmp_path / "good.ckpt")
    assert open_weights(tmp_path / "good.ckpt").tensors["w"].read().tolist() == [0, 1, 2]


def test_a_lightning_checkpoint_with_callbacks_and_optimizer(small: LatentDiffusion, tmp_path: Path) -> None:
    """torch's own safe reader refuses it; here the weights come through and the rest is said."""
    moments = {0: {"step": 3, "exp_avg": torch.ones(1000), "exp_avg_sq": torch.ones(1000)}}
    path = save_original(
        tmp_path / "anything.txt",
        small,
        epoch=3,
        callbacks={ModelCheckpoint: {"best_model_path": Path("x"), "object": ModelCheckpoint(dirpath="x")}},
        optimizer_states=[{"state": moments, "param_groups": [{"lr": 1e-5}]}],
        hyper_parameters=argparse.Namespace(a=1),
    )
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    loaded = load_checkpoint(path, config=small_config())
    assert loaded.layout == "compvis"
    assert same_weights(loaded.model, small)
    assert any("optimizer_states" in note and "not read" in note for note in loaded.notes)


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    shared = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(
        whole=shared,
        transposed=shared.T,
        row=shared[2],
        column=shared[:, 3],
        parameter=nn.Parameter(torch.randn(3)),
        empty=torch.empty(0, 4),
        scalar=torch.tensor(2.5),
        **{str(dtype): torch.arange(4).to(dtype) for dtype in (
            torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.bool,
        )},
    )  # fmt: skip
    torch.save(state, tmp_path / "state.pt")
    found = open_weights(tmp_path / "state.pt").tensors
    assert list(found) == list(state)
    for key, value in state.items():
        read = found[key].read()
        assert read.dtype == found[key].dtype == value.dtype
        assert tuple(read.shape) == found[key].shape
        assert torch.equal(read, value), key


def test_writing_to_what_was_read_leaves_the_file(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "state.pt")
    tensor = open_weights(tmp_path / "state.pt").tensors["w"]
    tensor.read().fill_(3.0)
    assert not tensor.read().any()


@pytest.mark.parametrize("name", ["state_dict", "model", "module"])
def test_wrapped_once_or_twice(tmp_path: Path, name: str) -> None:
    torch.save({name: {"state_dict": {"w": torch.ones(2)}}, "epoch": 1}, tmp_path / "state.pt")
    weights = open_weights(tmp_path / "state.pt")
    assert list(weights.tensors) == ["w"]
    assert weights.extra == ("epoch",)
