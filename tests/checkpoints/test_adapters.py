"""Adapters in files: read as written, merged into every layout, and refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbe.checkpoints.adapters import open_adapter, save_adapter, with_adapters
from pbe.checkpoints.loading import load_checkpoint, open_checkpoint
from pbe.checkpoints.native import save_model
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.adapters import adapter_state, add_adapter, load_adapter, merge_adapters, remove_adapter
from tests.checkpoints.small import small_config, small_model
from tests.commands import convert as convert_checkpoint
from tests.models.tiny import relative

PARTS = ["self_attention", "cross_attention", "projections", "residual", "mapper"]
RANK, ALPHA = 3, 1.5


@pytest.fixture
def state(small: LatentDiffusion) -> dict[str, Tensor]:
    """The state of an adapter whose every number counts; the model is left as it was."""
    add_adapter(small, PARTS, RANK, ALPHA)
    generator = torch.Generator().manual_seed(4)
    drawn = adapter_state(small)
    found = {key: 0.1 * torch.randn(value.shape, generator=generator) for key, value in drawn.items()}
    remove_adapter(small)
    return found


@pytest.fixture
def file(state: dict[str, Tensor], tmp_path: Path) -> Path:
    save_adapter(tmp_path / "mug.safetensors", state, ALPHA, "the base", {"steps": 4})
    return tmp_path / "mug.safetensors"


def expected_weight(weight: Tensor, state: dict[str, Tensor], layer: str, scale: float) -> Tensor:
    """The definition, in double precision."""
    down, up = state[f"{layer}.down"].double(), state[f"{layer}.up"].double()
    return weight.double() + scale * ALPHA / RANK * torch.einsum("or,r...->o...", up, down)


def test_a_file_says_what_it_was_told(file: Path, state: dict[str, Tensor]):
    adapter = open_adapter(file)
    assert (adapter.alpha, adapter.base, adapter.settings) == (ALPHA, "the base", {"steps": 4})
    assert all(torch.equal(value, state[key]) for key, value in adapter.read().items())
    assert adapter.read().keys() == load_file(file).keys() == state.keys()


def test_the_folder_of_a_run_stands_for_its_adapter(file: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    file.rename(tmp_path / "run" / "adapter.safetensors")
    assert open_adapter(tmp_path / "run").base == "the base"
    with pytest.raises(UserError, match="is a run that trained adapters: load the model"):
        load_checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match=r"has no adapter\.safetensors; name a file"):
        open_adapter(tmp_path)


def test_merging_in_files_is_the_definition(small: LatentDiffusion, file: Path, state, tmp_path: Path):
    save_model(tmp_path / "base", small)
    opened = with_adapters(
        open_checkpoint(tmp_path / "base"), [(open_adapter(file), 0.5), (open_adapter(file), 1.0)]
    )
    merged, before = opened.read(None).state_dict(), small.state_dict()
    for layer in open_adapter(file).layers:
        wanted = expected_weight(before[f"{layer}.weight"], state, layer, 1.5)
        assert relative(merged.pop(f"{layer}.weight").double(), wanted) < 1e-6
    assert all(torch.equal(value, before[key]) for key, value in merged.items())


@pytest.mark.parametrize("layout", ["native", "compvis", "diffusers"])
def test_the_command_merges_into_every_layout(small, file: Path, state, tmp_path: Path, layout: str):
    save_model(tmp_path / "base", small)
    words = [tmp_path / "base", tmp_path / "out", "--to", layout, "--verify", "--merge", f"{file}:0.5"]
    assert convert_checkpoint.main([str(word) for word in words]) == 0
    found = load_checkpoint(tmp_path / "out").model.state_dict()
    load_adapter(small, state, ALPHA, 0.5, "mug")
    merge_adapters(small)
    assert all(
        relative(found[key].float(), value.float()) < 1e-6 for key, value in small.state_dict().items()
    )


def test_a_model_with_adapters_is_saved_merged(small: LatentDiffusion, state, tmp_path: Path):
    load_adapter(small, state, ALPHA, 1.0, "mug")
    save_model(tmp_path / "out", small)
    merge_adapters(small)
    found = load_checkpoint(tmp_path / "out").model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in small.state_dict().items())


def test_what_does_not_fit_is_told(small: LatentDiffusion, file: Path, tmp_path: Path):
    config = small_config()
    wider = small_model(replace(config, unet=replace(config.unet, model_channels=64)))
    save_model(tmp_path / "wider", wider)
    with pytest.raises(UserError, match=r"does not fit .*unet\.down.*, not \[.* trained on 'the base'"):
        with_adapters(open_checkpoint(tmp_path / "wider"), [(open_adapter(file), 1.0)])


def test_what_is_no_adapter_is_told(small: LatentDiffusion, file: Path, state, tmp_path: Path):
    save_model(tmp_path / "base", small)
    with pytest.raises(UserError, match="is not an adapter of this project"):
        open_adapter(tmp_path / "base" / "unet.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        open_adapter(tmp_path / "nowhere.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError):
        open_adapter(file)
    said = {"format": "pbe-adapter-1", "adapter": '{"alpha": 1, "base": "", "settings": {}}'}
    first = next(iter(state)).rpartition(".")[0]
    damaged = [
        {f"{first}.down": state[f"{first}.down"]},
        {f"{first}.down": torch.ones(2, 4), f"{first}.up": torch.ones(4, 3)},
        {f"{first}.down": torch.ones(2, 4), f"{first}.up": torch.ones(4, 2), f"{first}.more": torch.ones(1)},
    ]
    for content in damaged:
        save_file(content, file, said)
        with pytest.raises(UserError, match="is damaged"):
            open_adapter(file)
    save_file(damaged[0], file, said | {"adapter": "{}"})
    with pytest.raises(UserError, match="a setting cannot be read"):
        open_adapter(file)


def test_numbers_that_are_not_finite_are_told(small: LatentDiffusion, state, tmp_path: Path):
    key = next(iter(state))
    save_adapter(tmp_path / "bad.safetensors", state | {key: torch.full_like(state[key], torch.nan)}, ALPHA)
    with pytest.raises(UserError, match="holds NaN or infinity"):
        open_adapter(tmp_path / "bad.safetensors").read()
