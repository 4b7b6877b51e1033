"""The measuring script, on a tiny model."""

from __future__ import annotations

import re

import pytest
import torch

from pbe.checkpoints.native import save_model
from pbe.checkpoints.tensors import DTYPES
from pbe.config import ModelConfig
from scripts import edit_full_size
from tests.models.tiny import tiny_encoder_config, tiny_model_config


def small_config() -> ModelConfig:
    """A model with a tower of the official kind, which has nothing but parameters."""
    config = tiny_model_config()
    config.exemplar_encoder = tiny_encoder_config("vit/32x2-patch16-heads4-mlp64-quickgelu")
    return config


def test_weights_are_drawn_in_their_type_and_numbers_stay_finite() -> None:
    model = edit_full_size.random_model(small_config(), torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    latents = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    output = model.predict(latents, torch.tensor([7]), model.null_condition(1), latents, latents[:, :1])
    assert 0.01 < float(output.float().std()) < 100.0


def test_edit_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # the real one is a process of its own, of the official size
    monkeypatch.setattr(
        edit_full_size,
        "make_model",
        lambda folder, dtype: save_model(
            folder, edit_full_size.random_model(small_config(), DTYPES[dtype], "cpu")
        ),
    )
    assert edit_full_size.main(["--size", "32", "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["loaded", "edited"]
    assert all(re.search(r"peak memory \d+\.\d\d GiB", line) for line in lines[:2])
    assert lines[2].startswith("32x32 at 2 steps in torch.bfloat16 on cpu")


@pytest.mark.parametrize("options", [["--levers"], ["--device", "cuda", "--levers"]])
def test_what_cannot_be_measured(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert edit_full_size.main(options) == 2
    assert capsys.readouterr().err.startswith("error: ")
