"""Settings of every numeric type; paths of models: the home folder, and names that no system can have."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pbe.editing import loading
from pbe.editing.loading import Hub
from pbe.editing.settings import PRESETS, EditCommand, EditSettings, check_count, check_number, existing_path
from pbe.errors import EditTypeError, EditValueError


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert existing_path("~/model") == tmp_path / "model"
    assert existing_path(Path("~/model")) == tmp_path / "model"
    with pytest.raises(EditValueError, match="/none' does not exist; give a model's folder"):
        existing_path("~/none")
    asked: dict[str, Any] = {}
    answer = {"snapshot_download": lambda *_, **settings: asked.update(settings) or "there"}
    monkeypatch.setattr(loading, "snapshot_download", answer["snapshot_download"])
    assert Hub(cache_dir="~/cache", local_files_only=True).find("owner/name") == Path("there")
    assert asked["cache_dir"] == str(tmp_path / "cache")


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "a\0b", "C:\\models\\pbe", "http://x/y", ""])
def test_names_that_lead_nowhere(name: str):
    with pytest.raises(EditValueError, match=r"--model .* does not exist"):
        existing_path(name, "--model")


def test_what_may_be_a_repository():
    assert existing_path("owner/name") is None


@pytest.mark.parametrize(
    "value", [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), np.float64(3), Fraction(3)]
)
def test_whole_numbers_of_every_type(value: Any):
    assert check_count("steps", value) == 3
    assert type(check_count("steps", value)) is int
    assert type(check_number("scale", value)) is float


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, EditTypeError, "steps: bool; it must be an int"),
        (np.bool_(True), EditTypeError, "it must be an int"),
        ("3", EditTypeError, "steps: str; it must be an int"),
        (None, EditTypeError, "steps: NoneType; it must be an int"),
        (torch.tensor(3), EditTypeError, "steps: Tensor; it must be an int"),
        (np.array([3]), EditTypeError, "steps: ndarray; it must be an int"),
        (2.5, EditTypeError, "steps is 2.5; it must be a whole number"),
        (np.float32(2.5), EditTypeError, "steps is 2.5; it must be a whole number"),
        (0, EditValueError, "steps is 0; it must be at least 1"),
        (float("nan"), EditValueError, "steps is nan; it must be at least 1"),
        (float("inf"), EditValueError, "steps is inf; it must be at least 1"),
        (10**30, EditValueError, "steps is 10+; it must be at most 2147483647"),
    ],
)
def test_no_counts(value: Any, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        check_count("steps", value)


def test_numbers_beyond_the_floats():
    with pytest.raises(EditValueError, match="scale is too large a number"):
        check_number("scale", 10**400)


def test_settings_become_plain_numbers():
    given = {"steps": np.int64(4), "guidance_scale": np.float32(5), "eta": np.float64(0)}
    given |= {"height": np.int64(8), "width": 16.0, "margin": np.float32(0.5), "num_images": 2.0}
    settings = EditSettings(**given, preserve_background=np.bool_(True)).checked()
    kinds = {name: type(getattr(settings, name)) for name in given}
    whole = ("steps", "height", "width", "num_images")
    assert kinds == {name: int if name in whole else float for name in given}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 70_000}, "height is 70000; it must be at most 65535"),
        ({"margin": 1e300}, "margin is 1e.300; it must lie between 0 and 65535"),
        ({"margin": None}, "margin: NoneType; it must be a number"),
        ({"feather": float("nan")}, "feather is nan; it must lie between 0 and 65535"),
        ({"guidance_scale": -1}, "guidance_scale is -1; it must be a number from 0 up"),
        ({"steps": 0}, "num_inference_steps is 0; it must be at least 1"),
        ({"eta": 0.5, "solver": "euler"}, "eta above 0 is for solver ddim and lcm, not euler"),
        ({"seed": -1}, "seed is -1; it must lie between 0 and"),
        ({"region": "left"}, "no region 'left'; there are: full, mask"),
        ({"preserve_background": "no"}, "preserve_background: str; it must be True or False"),
        ({"preserve_background": None}, "preserve_background: NoneType; it must be True or False"),
    ],
)
def test_settings_of_no_meaning(settings: dict[str, Any], message: str):
    with pytest.raises((EditTypeError, EditValueError), match=message):
        EditSettings(**settings).checked()


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_fill_in_what_is_not_given(name: Any):
    found, values = EditSettings(preset=name).checked(), PRESETS[name]
    assert {key: getattr(found, key) for key in values} == values
    assert (found.preset, found.count) == (None, values["steps"])
    assert EditSettings(preset=name, steps=50).checked().count == 50
    own = EditSettings(preset=name, solver="ddim").checked()
    assert (own.solver, own.spacing, own.karras, own.count) == ("ddim", None, False, values["steps"])
    spaced = EditSettings(preset=name, spacing="leading").checked()
    assert (spaced.solver, spaced.spacing, spaced.karras) == (values["solver"], "leading", False)


def test_without_a_preset_there_are_fifty_steps():
    assert EditSettings().checked().count == 50


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"preset": "fast"}, EditValueError, "no preset 'fast'; there are: draft, normal, best"),
        ({"guidance_interval": (0.5, 0.2)}, EditValueError, "is 0.5 to 0.2; the lower number comes first"),
        ({"guidance_interval": (0.5, 1.2)}, EditValueError, "it must lie between 0 and 1"),
        ({"guidance_interval": 0.5}, EditTypeError, "it must be two numbers from 0 to 1"),
        ({"guidance_interval": (0.1, "x")}, EditTypeError, "it must be a number"),
        ({"reuse_features": 0}, EditValueError, "reuse_features is 0; it must be at least 1"),
        ({"preset": "draft", "eta": 0.5}, EditValueError, "is for solver ddim and lcm, not dpmpp_2m"),
    ],
)
def test_settings_that_save_time_are_checked(settings: dict[str, Any], kind: type, message: str):
    with pytest.raises(kind, match=message):
        EditSettings(**settings).checked()


@pytest.mark.parametrize("name", ["image", "mask", "exemplar", "pairs"])
def test_urls_are_no_files(name: str):
    command = EditCommand(model="toy", **{name: "https://host/a.png"})
    with pytest.raises(EditValueError, match=f"--{name} is the URL 'https://host/a.png'; download it"):
        command.checked()


def test_a_compiled_unet_reuses_nothing():
    command = EditCommand(model="toy", compile=True, reuse_features=2)
    with pytest.raises(EditValueError, match="--compile and --reuse-features cannot go together"):
        command.checked()
