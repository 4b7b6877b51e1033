"""What stands in a model's files of how it is run: read, refused, and kept by conversions."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pbe.checkpoints.loading import load_checkpoint, open_checkpoint
from pbe.checkpoints.saving import LAYOUTS, convert, save_checkpoint
from pbe.checkpoints.settings import KEY, Usage, usage_from_json
from pbe.diffusion.solvers import SolverChoice
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from tests.checkpoints.small import small_model

FULL = Usage(
    SolverChoice("ddim", "uniform", offset=0, end="clean", clip=0.5),
    "original",
    True,
    {"size": {"shortest_edge": 40}, "image_mean": [0.1, 0.2, 0.3]},
)


@pytest.fixture(scope="module")
def small() -> LatentDiffusion:
    return small_model()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_all_of_it(small: LatentDiffusion, layout: str, tmp_path: Path) -> None:
    """The weights' own mean stays where the preprocessor has another."""
    usage = replace(FULL, conventions="original" if layout == "diffusers" else "diffusers")
    save_checkpoint(tmp_path, small, layout, usage=usage)
    opened = open_checkpoint(tmp_path)
    found = opened.usage.complete(layout)
    assert replace(found, scheduler=None) == usage
    assert opened.config.exemplar_encoder == small.config.exemplar_encoder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_without_it_say_nothing(small: LatentDiffusion, layout: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small, layout)
    usage = open_checkpoint(tmp_path).usage
    assert (usage.solver, usage.conventions, usage.watermark) == (None, None, None)
    found = usage.complete(layout)
    theirs = layout == "diffusers"
    assert found.conventions == ("diffusers" if theirs else "original")
    assert found.solver is not None
    assert found.solver.name == ("pndm" if theirs else "plms")


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_safety_checker_goes_along(
    small: LatentDiffusion, source: str, layout: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "in", small, source)
    checker = tmp_path / "in/safety_checker"
    checker.mkdir()
    (checker / "config.json").write_text('{"architectures": ["StableDiffusionSafetyChecker"]}')
    (checker / "model.safetensors").write_bytes(b"weights")
    convert(open_checkpoint(tmp_path / "in"), tmp_path / "out", layout)
    assert (tmp_path / "out/safety_checker/model.safetensors").read_bytes() == b"weights"
    if layout == "diffusers":
        index = json.loads((tmp_path / "out/model_index.json").read_text())
        assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]


def test_a_file_without_the_safety_checker_is_told(
    small: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path / "in", small)
    (tmp_path / "in/safety_checker").mkdir()
    convert(open_checkpoint(tmp_path / "in"), tmp_path / "out.ckpt", "compvis")
    assert f"'{tmp_path}/out.ckpt' is a single file: the safety checker is not carried over" in caplog.text


def test_a_scheduler_that_is_not_known_is_told(
    small: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = {"_class_name": "LCMScheduler", "original_inference_steps": 50}
    save_checkpoint(tmp_path / "in", small, "diffusers", usage=Usage(scheduler=scheduler))
    with caplog.at_level(logging.WARNING):
        convert(open_checkpoint(tmp_path / "in"), tmp_path / "native", "native")
    assert "'LCMScheduler' is not supported" in caplog.text
    convert(open_checkpoint(tmp_path / "in"), tmp_path / "out", "diffusers")
    written = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert written.items() >= scheduler.items()


@pytest.mark.parametrize(
    ("kind", "betas"),
    [("PNDMScheduler", (0.0001, 0.02)), ("HeunDiscreteScheduler", (0.00085, 0.012))],
)
def test_betas_that_are_missing_are_those_of_the_class(
    small: LatentDiffusion, kind: str, betas: tuple[float, float], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, small, "diffusers")
    path = tmp_path / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": kind, "beta_schedule": "scaled_linear"}))
    schedule = open_checkpoint(tmp_path).config.schedule
    assert (schedule.beta_start, schedule.beta_end) == betas


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler", "beta_start": 0.1}, "'beta_schedule' is \"linear\""),
        ({"_class_name": "XScheduler", "beta_schedule": "scaled_linear"}, "'beta_start' is missing"),
    ],
)
def test_betas_that_nothing_says(
    small: LatentDiffusion, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, small, "diffusers")
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (3, "pipeline is 3; it must be a section"),
        ([], r"pipeline is \[\]"),
        ({"solvr": {}}, "no setting 'solvr'; there are: solver, conventions"),
        ({"conventions": 3}, "conventions is 3, which is not possible"),
        ({"watermark": "yes"}, 'watermark is "yes"'),
        ({"solver": "ddim"}, 'solver is "ddim"'),
        ({"solver": {"name": "magic"}}, "solver: no solver 'magic'"),
        ({"preprocessor": []}, r"preprocessor is \[\]"),
    ],
    ids=str,
)
def test_sections_that_cannot_be_read(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^config.json: pipeline.*{message.removeprefix('pipeline')}"):
        usage_from_json(values, "config.json")


def test_a_broken_section_of_a_native_folder(small: LatentDiffusion, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {KEY: {"speed": 3}}))
    with pytest.raises(UserError, match="no setting 'speed'"):
        load_checkpoint(tmp_path)
