"""The benchmark of the UNet, on a small one: all forms give the same numbers, and the table names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.benchmarks import unet


@pytest.mark.parametrize("memory", ["--no-memory", pytest.param("", marks=pytest.mark.slow)])
def test_all_forms_take_turns_and_agree(
    memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is timed is the same computation: every form ends at one output, diffusers' among them."""
    path = tmp_path / "times.json"
    options = f"--channels 32 --size 64 --repeats 2 --dtypes float32 --clock cpu --json {path} {memory}"
    assert unet.main(options.split()) == 0
    tables = json.loads(path.read_text())["tables"]
    numbers = next(table for title, table in tables.items() if title.startswith("float32"))
    assert {unet.OURS, unet.THEIRS, "plain", "two calls", "no Winograd"} < set(numbers)
    forms = [form for form in numbers.values() if "to float32" in form]
    assert len(forms) == len(numbers) - 1  # the limit has a time only
    assert all(
        form["to float32"] < 1e-4 and form["least"] <= form["median"] <= form["most"] for form in forms
    )
    printed = capsys.readouterr().out
    assert all(name in printed for name in numbers)


@pytest.mark.parametrize("options", [["--channels", "40"], ["--size", "8"], ["--repeats", "0"]])
def test_what_cannot_be_measured(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert unet.main(options) == 2
    assert capsys.readouterr().err.startswith("error: ")
