"""What a run leaves is a model: its folder, its model/ and its checkpoints, with what they carry."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pbe.checkpoints.loading import load_checkpoint, open_checkpoint
from pbe.checkpoints.native import save_model
from pbe.config import Config, save_yaml, to_dict
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from tests.checkpoints.small import same_weights, small_config
from tests.commands import convert as convert_checkpoint

CONFIG = replace(Config(), model=small_config())


@pytest.fixture
def run(small: LatentDiffusion, tmp_path: Path) -> Path:
    """A run that was stopped before it had a model; its plain weights are zeros."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    write(folder / "checkpoints" / "last.ckpt", small)
    return folder


def write(path: Path, model: LatentDiffusion, **changes: object) -> None:
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    content = {
        "state_dict": {key: torch.zeros_like(value) for key, value in state.items()},
        "ema": state,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(1000)}}}],
        "config": to_dict(CONFIG),
        "global_step": 4,
    }
    torch.save(content | changes, path)


def notes(path: Path, **settings: object) -> str:
    return "; ".join(load_checkpoint(path, **settings).notes)  # type: ignore[arg-type]


def test_a_checkpoint_brings_its_configuration_and_its_average(small: LatentDiffusion, run: Path) -> None:
    path = run / "checkpoints" / "last.ckpt"
    loaded = load_checkpoint(path)
    assert same_weights(loaded.model, small)
    assert loaded.model.config == small.config
    assert loaded.notes == (
        "averaged (EMA) weights taken, 400 tensors; --raw-weights (raw_weights=True) takes the plain ones",
    )
    assert not any(v.any() for v in load_checkpoint(path, raw_weights=True).model.state_dict().values())


def test_optimizer_moments_are_not_read(
    small: LatentDiffusion, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pbe.checkpoints.tensors import WeightFile

    counts: list[int] = []
    values = WeightFile.values

    def counted(self: WeightFile, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        counts.append(count)
        return values(self, offset, count, dtype)

    monkeypatch.setattr(WeightFile, "values", counted)
    load_checkpoint(run)
    assert sum(counts) == sum(value.numel() for value in small.state_dict().values())


def test_a_run_stands_for_its_newest_checkpoint(small: LatentDiffusion, run: Path) -> None:
    assert same_weights(load_checkpoint(run).model, small)
    assert "a run: its checkpoints/last.ckpt is taken; averaged" in notes(run)
    assert "a run: its last.ckpt is taken" in notes(run / "checkpoints")
    for step in (200, 1000):
        write(run / "checkpoints" / f"step={step:07d}.ckpt", small)
    (run / "checkpoints" / "last.ckpt").unlink()
    assert "its checkpoints/step=0001000.ckpt is taken" in notes(run)


def test_a_run_stands_for_its_model(small: LatentDiffusion, run: Path) -> None:
    save_model(run / "model", small)
    assert notes(run) == "a run: its model/ is taken"
    assert "a run: its checkpoints/last.ckpt is taken; plain weights taken" in notes(run, raw_weights=True)
    with pytest.raises(UserError, match="holds one set of weights only; --raw-weights is for"):
        load_checkpoint(run / "model", raw_weights=True)
    later = (run / "model" / "config.json").stat().st_mtime + 3600
    os.utime(run / "checkpoints" / "last.ckpt", (later, later))
    assert "last.ckpt was written after it; name that file to take it" in notes(run)


def test_an_empty_run_and_a_broken_one(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"last\.ckpt: damaged"):
        load_checkpoint(run)
    path.unlink()
    with pytest.raises(UserError, match="is not a model folder: it holds no weights"):
        load_checkpoint(run)


def test_a_configuration_that_is_given_is_used_and_told(run: Path) -> None:
    other = replace(small_config(), image_size=64)
    loaded = load_checkpoint(run, config=other)
    assert loaded.model.config.image_size == 64
    said = "the configuration given is used, which is not the one it carries: image_size 32 -> 64"
    assert said in loaded.notes


def test_older_checkpoints_take_the_configuration_of_their_run(small: LatentDiffusion, run: Path) -> None:
    path = run / "checkpoints" / "last.ckpt"
    write(path, small, config=None, ema=None)
    save_yaml(
        replace(CONFIG, data=replace(CONFIG.data, image_size=32, exemplar_size=32)), run / "config.yaml"
    )
    loaded = load_checkpoint(path)
    assert loaded.model.config == small.config
    assert not any(value.any() for value in loaded.model.state_dict().values())
    assert "no average in it: its only weights are taken" in notes(path, raw_weights=True)


def test_an_autoencoders_checkpoint_says_what_it_is(small: LatentDiffusion, run: Path) -> None:
    write(run / "checkpoints" / "last.ckpt", small, config=to_dict(replace(CONFIG, task="autoencoder")))
    assert "its UNet is untrained, its scale factor not yet measured" in notes(run)


@pytest.mark.parametrize(
    "wrong", [{"unet": {"model_channels": "wide"}}, {"unet": torch.zeros(2)}, {"nothing": 1}]
)
def test_a_carried_configuration_that_is_none(
    small: LatentDiffusion, run: Path, wrong: dict[str, object]
) -> None:
    write(run / "checkpoints" / "last.ckpt", small, config={"model": wrong})
    with pytest.raises(UserError, match=r"last\.ckpt: the configuration in it") as caught:
        load_checkpoint(run)
    assert "\n" not in str(caught.value)
    assert same_weights(load_checkpoint(run, config=small_config()).model, small)


def test_conversion_and_pipeline_say_which_weights_they_take(
    small: LatentDiffusion,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert convert_checkpoint.main([str(run), str(tmp_path / "average"), "--verify"]) == 0
    assert "note: averaged (EMA) weights taken" in capsys.readouterr().out
    assert same_weights(load_checkpoint(tmp_path / "average").model, small)
    assert convert_checkpoint.main([str(run), str(tmp_path / "plain"), "--raw-weights"]) == 0
    assert "note: plain weights taken" in capsys.readouterr().out
    assert not any(value.read().any() for value in open_checkpoint(tmp_path / "plain").tensors.values())
    pipe = PaintByExample.from_pretrained(run)
    assert same_weights(pipe.model, small)
    assert "averaged (EMA) weights taken" in caplog.text
    moved = shutil.copytree(run, tmp_path / "moved")  # what was said once of a model is not said again
    plain = PaintByExample.from_pretrained(moved, raw_weights=True)
    assert not any(value.any() for value in plain.model.state_dict().values())
    assert "plain weights taken" in caplog.text
