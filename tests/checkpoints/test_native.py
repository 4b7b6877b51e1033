"""The project's own layout: nothing is lost, and every damage is one clear line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbe.checkpoints import native
from pbe.checkpoints.native import PARTS, load_config, load_model, load_part, save_model
from pbe.checkpoints.weight_files import write_safetensors
from pbe.editing.batch.records import model_digests
from pbe.errors import UserError
from pbe.evaluation.ablation.stages import model_hash
from pbe.files import sha256_of
from pbe.models import LatentDiffusion
from tests.commands import convert as convert_checkpoint
from tests.models.tiny import tiny_encoder_config, tiny_model_config


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    return LatentDiffusion(tiny_model_config()).eval()


@pytest.fixture
def folder(model: LatentDiffusion, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", model)
    return tmp_path / "model"


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert list(state) == list(expected)
    return all(
        torch.equal(state[key], expected[key]) and state[key].dtype == expected[key].dtype for key in state
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_round_trip_is_bit_identical(model: LatentDiffusion, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "autoencoder.safetensors", "config.json", "exemplar_encoder.safetensors", "unet.safetensors",
    ]  # fmt: skip
    loaded = load_model(folder)
    assert loaded.config == model.config
    assert same(loaded.state_dict(), model.state_dict())
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded.encode_exemplar(pixels), model.encode_exemplar(pixels))


def test_saving_twice_gives_the_same_bytes(model: LatentDiffusion, folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "again", load_model(folder))
    assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_round_once(model: LatentDiffusion, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(tmp_path, model, dtype)
    files = {
        key: value for part in PARTS for key, value in load_file(tmp_path / f"{part}.safetensors").items()
    }
    assert {value.dtype for value in files.values()} == {dtype, torch.int64}
    rounded = {
        key: value.to(dtype).float() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    assert same(load_model(tmp_path).state_dict(), rounded)


def test_the_command_converts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_checkpoint.main([str(folder), str(tmp_path / "half"), "--dtype", "fp16"]) == 0
    assert "parameters as fp16" in capsys.readouterr().out
    save_model(tmp_path / "expected", load_model(folder), torch.float16)
    assert contents(tmp_path / "half") == contents(tmp_path / "expected")
    assert convert_checkpoint.main([str(folder), str(tmp_path / "half"), "--dtype", "float16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: Invalid value "float16" for --dtype')
    assert error.count("\n") == 1


def test_networks_that_another_folder_holds(
    model: LatentDiffusion, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy with another UNet shares the rest, wherever the two lie together; what changed is its own."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for network in (other.unet, other.autoencoder):
            next(network.parameters()).add_(1.0)
    save_model(tmp_path / "whole", other)
    share = ["--share", str(folder)]
    assert convert_checkpoint.main([str(tmp_path / "whole"), str(tmp_path / "students/one"), *share]) == 0
    small = tmp_path / "students/one"
    assert sorted(contents(small)) == ["autoencoder.safetensors", "config.json", "unet.safetensors"]
    assert json.loads((small / "config.json").read_text())["shared"] == {"exemplar_encoder": "../../model"}
    (tmp_path / "moved").mkdir()
    for name in ("model", "students"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = tmp_path / "moved/students/one"
    assert same(load_model(moved).state_dict(), other.state_dict())
    load_part(moved, "exemplar_encoder", encoder := copy.deepcopy(model.exemplar_encoder))
    assert same(encoder.state_dict(), model.exemplar_encoder.state_dict())
    # Converted again it is whole, and what shares with it names the folder that holds the file.
    assert convert_checkpoint.main([str(moved), str(tmp_path / "again")]) == 0
    assert contents(tmp_path / "again").keys() == contents(tmp_path / "whole").keys()
    assert convert_checkpoint.main([str(moved), str(tmp_path / "moved/two"), "--share", str(moved)]) == 0
    shared = {"unet": "students/one", "autoencoder": "students/one", "exemplar_encoder": "model"}
    assert json.loads((tmp_path / "moved/two/config.json").read_text())["shared"] == {
        part: f"../{place}" for part, place in shared.items()
    }
    capsys.readouterr()
    (tmp_path / "moved/model/exemplar_encoder.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"exemplar_encoder.safetensors is missing; it is shared with '\.\./\.\./model'"
    ):
        load_model(moved)


def test_sharing_what_is_not_equal(
    model: LatentDiffusion, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    assert convert_checkpoint.main([str(folder), str(half), "--dtype", "fp16", "--share", str(folder)]) == 2
    assert "no network of the model is equal" in capsys.readouterr().err
    assert not half.exists()
    assert convert_checkpoint.main([str(folder), str(half), "--to", "compvis", "--share", str(folder)]) == 2
    assert "--share goes with --to native only" in capsys.readouterr().err
    assert convert_checkpoint.main([str(folder), str(half), "--share", str(tmp_path)]) == 2
    assert "is not a model folder" in capsys.readouterr().err
    before = contents(folder)
    assert convert_checkpoint.main([str(folder), str(folder), "--share", str(folder)]) == 2
    assert "cannot share networks with itself" in capsys.readouterr().err
    assert contents(folder) == before


def test_hashes_of_a_model_cover_what_it_shares(model: LatentDiffusion, folder: Path, tmp_path: Path) -> None:
    """Else edits and caches of another model would be taken for this one's."""
    assert convert_checkpoint.main([str(folder), str(tmp_path / "fast"), "--share", str(folder)]) == 0
    shared = {f"../model/{part}.safetensors" for part in PARTS}

    def hashes() -> tuple[dict[str, str], str, str]:
        fast = tmp_path / "fast"
        of_file = model_hash(fast, sha256_of, "autoencoder.safetensors")
        return model_digests(fast), model_hash(fast, sha256_of), of_file

    digests, whole, autoencoder = hashes()
    assert set(digests) == shared | {"config.json"}
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.unet.parameters()).add_(1.0)
    save_model(folder, other)
    changed = hashes()
    assert {name for name in digests if changed[0][name] != digests[name]} == {"../model/unet.safetensors"}
    assert changed[1] != whole
    assert changed[2] == autoencoder


@pytest.mark.parametrize("shared", [[], 7, {"unet": 1}, "model"])
def test_malformed_sharing(folder: Path, shared: object) -> None:
    content = json.loads((folder / "config.json").read_text()) | {"shared": shared}
    (folder / "config.json").write_text(json.dumps(content))
    for read in (load_model, model_digests):
        with pytest.raises(UserError, match="'shared' names no folders"):
            read(folder)


def test_type_in_memory_can_be_chosen(folder: Path) -> None:
    loaded = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.encode_exemplar(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_tower_with_computed_buffers(tmp_path: Path) -> None:
    """Rotary position tables are in no file and have to be there after loading all the same."""
    config = tiny_model_config()
    config.exemplar_encoder = tiny_encoder_config("timm/eva02_tiny_patch14_224")
    config.exemplar_encoder.image_size = 56
    model = LatentDiffusion(config).eval()
    assert set(dict(model.named_buffers())) - set(model.state_dict())
    save_model(tmp_path, model)
    pixels = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(load_model(tmp_path).encode_exemplar(pixels), model.encode_exemplar(pixels))


def test_single_part(model: LatentDiffusion, tmp_path: Path) -> None:
    save_model(tmp_path, model)
    other = LatentDiffusion(tiny_model_config())
    load_part(tmp_path, "autoencoder", other.autoencoder)
    assert same(other.autoencoder.state_dict(), model.autoencoder.state_dict())
    assert other.autoencoder.encoder.conv_in.weight.requires_grad


def test_keys_that_do_not_fit_are_listed_and_counted(folder: Path) -> None:
    path = folder / "unet.safetensors"
    state = load_file(path)
    gone = sorted(state)[:12]
    reshaped = sorted(state)[20]
    state = {key: value for key, value in state.items() if key not in gone}
    state |= {"stranger": torch.zeros(1), reshaped: torch.zeros(3, 1, 4)}
    save_file(state, path)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert f"12 missing: {', '.join(gone[:10])}, ...;" in message
    assert gone[10] not in message
    assert "1 unexpected: stranger;" in message
    assert f"1 misshapen: {reshaped} (has [3, 1, 4], not " in message
    assert message.endswith("It looks like the UNet alone of a native folder; give the whole folder.")


def test_weights_of_another_size_do_not_load(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"]["unet"]["model_channels"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"unet\.safetensors does not fit the model: \d+ misshapen: "):
        load_model(folder)


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_file(folder: Path, kept: float) -> None:
    path = folder / "autoencoder.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=r"autoencoder\.safetensors: damaged"):
        load_model(folder)


@pytest.mark.parametrize("part", PARTS)
def test_missing_part(folder: Path, part: str) -> None:
    (folder / f"{part}.safetensors").unlink()
    with pytest.raises(UserError, match=f"{part}.safetensors is missing"):
        load_model(folder)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "not an object of settings"),
        (b'{"format": "something-else", "model": {}}', "not a model of this project"),
        (b'{"_class_name": "UNet2DConditionModel"}', "not a model of this project"),
        (b'{"format": "pbe-native-1"}', "no 'model' section"),
        (b'{"format": "pbe-native-1", "model": 3}', "no 'model' section"),
        (
            b'{"format": "pbe-native-1", "model": {"image_sise": 64}}',
            "unknown key 'image_sise'.*'image_size'",
        ),
        (b'{"format": "pbe-native-1", "model": {"image_size": "big"}}', "wrong value for 'image_size'"),
        (b'{"format": "pbe-native-1", "model": {"prediction": "x0"}}', "prediction.* must be one of eps, v"),
    ],
)
def test_wrong_configuration(folder: Path, content: bytes, match: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=match):
        load_config(folder)


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a model folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_failing_save_leaves_the_older_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    before = contents(folder)
    calls = []

    def failing(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == fails_at:
            path.write_bytes(b"half of it")
            raise OSError("no space left on device")
        write_safetensors(path, *rest)

    monkeypatch.setattr(native, "write_safetensors", failing)
    torch.manual_seed(99)
    with pytest.raises(OSError, match="no space left"):
        save_model(folder, LatentDiffusion(tiny_model_config()))
    assert contents(folder) == before
