"""Options of sample.py beyond a plain edit into a folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from pbe.editing.cli import main
from tests.sample_calls import arguments, complaint, pixels, write_files, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(tmp_path)


def test_a_single_file_instead_of_a_folder(model: Path, files: Path, capsys: pytest.CaptureFixture[str]):
    call = arguments(model, files)
    del call[call.index("--out") : call.index("--out") + 2]
    target = files / "new" / "edit.webp"
    assert main([*call, "--output", str(target), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{target}\n"
    assert printed.err == ""
    assert sorted(path.name for path in target.parent.iterdir()) == ["edit.json", "edit.webp"]
    hole = pixels(files / "m.png") > 0
    np.testing.assert_array_equal(pixels(target)[~hole], pixels(files / "a.png")[~hole])
    again = shlex.split(json.loads((files / "new/edit.json").read_text())["repeat"])[2:]
    again[again.index("--output") + 1] = f"{files}/again.png"
    assert main(again) == 0
    assert np.abs(pixels(files / "again.png") - pixels(target)).max() <= 1
    capsys.readouterr()
    for more, message in (
        (["--output", f"{files}/a.png"], "the output would replace its input"),
        (["--output", "edit.gif"], "must end in one of .png"),
        (["--output", "edit.png", "--num-images", "2"], "--output is the file of a single edit"),
        ([], "give --out (a folder) or --output"),
    ):
        assert message in complaint(capsys, [*call, *more])


def test_the_settings_reach_the_pipeline_and_the_repeat_command(model: Path, files: Path):
    more = ["--solver", "euler", "--karras", "--spacing", "trailing", "--conventions", "diffusers"]
    more += ["--region", "mask", "--margin", "0.25", "--feather", "2", "--height", "24", "--width", "16"]
    more += ["--attention-slicing", "64", "--safety-checker", "none", "--offline"]
    assert main(arguments(model, files, *more)) == 0
    record = json.loads((files / "out/a_0.json").read_text())
    expected = {"solver": "euler", "karras": True, "spacing": "trailing", "conventions": "diffusers"}
    expected |= {"region": "mask", "margin": 0.25, "feather": 2.0, "edited_at": [24, 16], "blackened": False}
    assert {key: record[key] for key in expected} == expected
    again = shlex.split(record["repeat"])[2:]
    again[again.index("--out") + 1] = f"{files}/again"
    assert main(again) == 0
    assert np.abs(pixels(files / "again/a_0.png") - pixels(files / "out/a_0.png")).max() <= 1
    plain = arguments(model, files, "--name", "plain")
    assert main(plain) == 0
    assert np.abs(pixels(files / "out/plain_0.png") - pixels(files / "out/a_0.png")).max() > 10
