"""The demo's stages in a reduced form: few scenes, few steps, a small model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pbe.checkpoints.native import save_model
from pbe.checkpoints.tower_weights import load_tower_weights
from pbe.config import load_config
from pbe.evaluation.demo import stages
from pbe.evaluation.report import BAND_GAP, GAP
from pbe.models import LatentDiffusion
from tests.commands import demo, evaluate

SMALL = """
model:
  image_size: 32
  prediction: v
  unet: {model_channels: 32, channel_mult: [1], num_res_blocks: 1, attention_factors: [1], num_heads: 2,
         context_dim: 32, norm_groups: 8}
  autoencoder: {channels: 8, channel_mult: [1, 2, 2], num_res_blocks: 1, norm_groups: 4, mid_attention: false,
                scale_factor: 1.0}
  exemplar_encoder: {tower: timm/tf_efficientnet_lite0, pretrained: pypi, image_size: 64, mapper_width: 32,
                     mapper_layers: 1}
data: {image_size: 32, exemplar_size: 64, batch_size: 16, num_workers: 0}
optimizer: {learning_rate: 3.0e-3}
trainer: {threads: 1, progress: false, precision: 32-true}
logging: {grid_steps: 2}
"""
REDUCED = [
    "--scenes",
    "40",
    "--steps",
    "24",
    "--objects",
    "5",
    "--sampling-steps",
    "2",
    "--shown",
    "3",
    "--guidance",
    "1",
    "3",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A configuration file and a model folder made with it, weights random but for the tower."""
    folder = tmp_path_factory.mktemp("small")
    path = folder / "small.yaml"
    path.write_text(SMALL)
    config = load_config(path)
    torch.manual_seed(0)
    model = LatentDiffusion(config.model)
    load_tower_weights(model.exemplar_encoder.tower, config.model.exemplar_encoder)
    save_model(folder / "model", model, torch.float16)
    unet = replace(config.model.unet, guidance_range=[1.0, 2.5], few_steps=2)
    student = LatentDiffusion(replace(config.model, unet=unet))
    student.load_state_dict(model.state_dict(), strict=False)
    save_model(folder / "student", student, torch.float16)
    return path, folder / "model"


def arguments(small: tuple[Path, Path], out: Path) -> list[str]:
    config, model = small
    student = model.with_name("student")
    return [
        *("--out", str(out), "--config", str(config), "--model", str(model), "--student", str(student)),
        *REDUCED,
    ]


def test_the_whole_way_from_scenes_to_the_page(small, tmp_path, capsys):
    out = tmp_path / "demo"
    assert demo.main(arguments(small, out)) == 0
    page = (out / "index.html").read_text()
    for heading in (
        "Edits of unseen scenes",
        "Outside its world",
        "Scores",
        "Training, just now",
        "Where the time went",
        "How to go on",
    ):
        assert heading in page
    # Masked, exemplar, two guidance scales, hidden; and the student's edit, at the scale nearest to theirs.
    assert page.count("data:image/webp") == 3 * 6 + 2 * 5
    assert page.count("2 steps, guidance 2.5") == 1
    assert re.search(r"faster by the distilled model: \d+ ms for an edit in 2 calls, not \d+ ms in 6;", page)
    assert page.count("data:image/png") == 1  # the grid of the training run
    assert f"pbe evaluate --model {small[1]} --out" in page
    assert "AUC, grey" in page
    assert "autoencoder alone" in page
    with Image.open(out / "edits.png") as sheet:
        assert sheet.height == 4 * (128 + GAP) + BAND_GAP  # masked, exemplar, edit, hidden
    assert "http" not in page
    printed = capsys.readouterr().out
    assert [f"== {n}. " in printed for n in range(1, 7)] == [True] * 6
    assert "untrained" in printed
    assert "peak memory" in printed
    assert len(list((out / "scenes" / "train").glob("*.tar"))) == 1
    assert (out / "example" / "mask.png").is_file()
    assert not (out / "pilot").exists()


def test_the_student_is_that_of_the_model_that_ships(small, monkeypatch):
    seen = []
    monkeypatch.setattr(stages, "run", lambda options: seen.append(Path(options.student).name))
    for arguments in ([], ["--model", "toy"], ["--model", str(small[1])], ["--student", "none"]):
        assert demo.main(arguments) == 0
    assert seen == ["fast", "fast", "none", "none"]


def test_a_failing_stage_leaves_no_page(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    out.mkdir()
    (out / stages.MARKER).touch()
    (out / "index.html").write_text("of an earlier run")
    monkeypatch.setattr(stages, "render", lambda options, clock: 1 / 0)
    assert demo.main(arguments(small, out)) == 1
    assert not (out / "index.html").exists()
    error = capsys.readouterr().err
    assert "error: stage 'Render scenes and pack shards' failed: ZeroDivisionError" in error
    assert "Traceback" in error


def test_rendering_that_fails_is_told(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages, "RENDER", ("-c", "raise SystemExit(1)"))
    assert demo.main(arguments(small, tmp_path / "demo")) == 2
    assert "error: stage 'Render scenes and pack shards': rendering failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "nowhere"], "no model at 'nowhere'"),
        (["--student", "nowhere"], "'nowhere' is not a model folder"),
        (["--student", "toy"], "is not distilled into few steps; give another, or none"),
        (["--objects", "1"], "at least 2"),
        (["--objects", "182"], "182 benchmark objects asked for; there are 181"),
        (["--steps", "-1"], "--steps 0 or more"),
        (["--seconds", "nan"], "--seconds must be a number above 0"),
        (["--guidance", "1", "-1"], "the guidance scale is -1.0; it must be a number from 0 up"),
        (["--guidance", "3", "3"], "each once"),
        (["--sampling-steps", "0"], "number of steps is 0"),
        (["--sampling-steps", "501"], "number of steps is 501; it must lie between 1 and 500"),
        (["--shown", "many"], 'Invalid value for --shown: unable to convert "many" into int'),
        (["--set", "trainer.max_step=3"], "nearest valid one is 'trainer.max_steps'"),
    ],
)
def test_mistakes_are_found_at_once(small, tmp_path, capsys, change, message):
    assert demo.main([*arguments(small, tmp_path / "demo"), *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_a_folder_of_someone_else_is_left_alone(small, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    assert demo.main(arguments(small, tmp_path)) == 2
    assert (tmp_path / "run" / "precious").exists()
    assert "the demo did not make" in capsys.readouterr().err


def test_evaluate_writes_scores_table_and_sheet(small, tmp_path, capsys):
    out = tmp_path / "scores"
    line = f"--model {small[1]} --out {out} --objects 4 --steps 2 --guidance 1 5 --sheet 3"
    assert evaluate.main(line.split()) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["objects"] == 4
    assert [row["guidance_scale"] for row in scores["guidance"]] == [1.0, 5.0]
    assert scores["guidance"][1]["gain"]["low"] <= scores["guidance"][1]["gain"]["high"]
    assert 0.0 <= scores["guidance"][0]["win_rate"]["low"] <= scores["guidance"][0]["win_rate"]["high"] <= 1.0
    sampling = scores["sampling"]
    assert {key: sampling[key] for key in ("device", "dtype", "batch_size")} == {
        "device": "cpu",
        "dtype": "fp32",
        "batch_size": 32,
    }
    assert sampling["threads"] == torch.get_num_threads()
    assert scores["features"]["tower"] == "tf_efficientnet_lite2"
    assert set(scores["autoencoder_ceiling"]) >= {
        "auc",
        "grey_auc",
        "first_of_20",
        "grey_first_of_20",
        "psnr",
    }
    assert (out / "scores.md").read_text() in capsys.readouterr().out
    assert (out / "grid.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "is not a model folder"),
        (["--device", "abacus"], "--device 'abacus' cannot be used here"),
        (["--solver", "magic"], "no solver 'magic'"),
        (["--steps", "0"], "steps is 0"),
        (["--dtype", "int8"], 'Invalid value "int8" for --dtype'),
    ],
)
def test_evaluate_tells_what_is_wrong(tmp_path, capsys, change, message):
    assert evaluate.main(["--model", str(tmp_path), "--out", str(tmp_path / "x"), *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
