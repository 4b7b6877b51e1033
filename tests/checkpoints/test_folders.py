"""Which of several copies of the weights a folder's file names say they are, and which is taken."""

from __future__ import annotations

from pathlib import Path, PurePath

import pytest
import torch
from safetensors.torch import save_file

from pbe.checkpoints.folders import FileChoice, is_pickle, open_folder, variant_of
from pbe.errors import UserError


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", ""),
        ("pytorch_model.bin", ""),
        ("model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.non_ema.bin", "non_ema"),
        ("model-00001-of-00002.safetensors", ""),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model.safetensors.index.json", ""),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("model.safetensors.fp16.index.json", "fp16"),
        ("pytorch_model.bin.index.json", ""),
    ],
)
def test_variants_are_words_before_the_ending(name: str, variant: str) -> None:
    assert variant_of(PurePath(name)) == variant
    assert is_pickle(PurePath(name)) == (".bin" in name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four copies, told apart by their number."""
    names = ("model.safetensors", "model.fp16.safetensors", "model.bin", "model.fp16.bin")
    for number, name in enumerate(names):
        state = {"w": torch.tensor([float(number)])}
        if name.endswith(".bin"):
            torch.save(state, tmp_path / name)
        else:
            save_file(state, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("variant", "safetensors", "number"),
    [(None, None, 0), ("fp16", None, 1), (None, False, 2), ("fp16", False, 3), ("fp16", True, 1)],
)
def test_the_copy_that_is_asked_for(
    folder: Path, variant: str | None, safetensors: bool | None, number: int
) -> None:
    found = open_folder(folder, FileChoice(variant, safetensors))
    assert found.tensors["w"].read().item() == number


def test_a_copy_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"variant 'ema' \(there is: fp16, no variant\)"):
        open_folder(folder, FileChoice("ema"))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="holds no safetensors, which use_safetensors=True asks for"):
        open_folder(folder, FileChoice(safetensors=True))
