from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.editing.batch import jobs
from pbe.editing.batch.jobs import Job, check_files, check_name, check_outputs, single_job
from pbe.editing.settings import MAX_SEED, EditCommand
from pbe.errors import UserError


def test_a_single_job_takes_the_name_of_its_image():
    command = EditCommand(model="m", image="x/a.b.jpg", mask="m", exemplar="e")
    assert single_job(command).name == "a.b"
    with pytest.raises(UserError, match="name '' cannot be the name of a file: it is empty"):
        single_job(replace(command, name=""))


def test_a_name_that_cannot_be_used_says_why():
    with pytest.raises(UserError, match="it has 240 of at most 200 bytes; give another"):
        check_name("é" * 120)
    for name in (".hidden", "a/b", "a\\b", "a\0b", "a\nb"):
        with pytest.raises(UserError, match="starts with a dot or holds a slash") as raised:
            check_name(name)
        assert "\n" not in str(raised.value)
    for name in ("a [1]", "{a,b}", "me@home 50%", "Zoë", "~a", "-x", "v1.2.final"):
        check_name(name)


def job(name: str, seed: int, image: str = "in.png") -> Job:
    return Job(Path(image), Path("m.png"), Path("e.png"), name, seed, f"line of {name} {seed}: ")


def test_outputs_must_differ(tmp_path: Path):
    check_outputs([job("a", 0), job("a", 3), job("b", 0)], 3, tmp_path)
    with pytest.raises(UserError, match="line of a 2: 'a_2' is already the output of another edit"):
        check_outputs([job("a", 0), job("a", 2)], 3, tmp_path)


def test_outputs_never_replace_inputs(tmp_path: Path):
    with pytest.raises(UserError, match="would replace its input"):
        check_outputs([job("a", 0, str(tmp_path / "a_1.png"))], 2, tmp_path)


def test_seeds_stay_within_range(tmp_path: Path):
    check_outputs([job("a", MAX_SEED)], 1, tmp_path)
    with pytest.raises(UserError, match="too large for 2 images"):
        check_outputs([job("a", MAX_SEED)], 2, tmp_path)


def test_a_link_that_leads_to_itself_is_no_traceback(tmp_path: Path):
    os.symlink("loop.png", tmp_path / "loop.png")
    check_outputs([job("a", 0, str(tmp_path / "loop.png"))], 1, tmp_path)


def test_checking_the_files_tells_what_decided_about_a_mask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pixels = np.zeros((8, 6, 4), np.uint8)
    pixels[2:4, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "m.png")
    Image.new("L", (8, 6), 255).save(tmp_path / "turned.png")
    Image.new("RGB", (6, 8)).save(tmp_path / "i.png")
    files = {key: tmp_path / f"{key}.png" for key in ("i", "m", "turned")}
    strokes, turned = (Job(files["i"], files[mask], files["i"], "n", 0) for mask in ("m", "turned"))
    first, second = check_files([strokes, turned])
    assert first.size == (8, 6)
    stretched = "it is 8x6, the image 6x8: stretched to fit; is one of them turned?"
    assert capsys.readouterr().err == (
        f"mask '{files['m']}': read by alpha, it repaints 25.0% of the image\n"
        f"mask '{files['turned']}': {stretched}\n"
    )
    for checked in (first, second):
        assert checked.take().mask.pixels.shape == (8, 6)


def test_files_are_read_once_unless_they_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (6, 8), "white").save(tmp_path / "i.png")
    one = Job(tmp_path / "i.png", tmp_path / "i.png", tmp_path / "i.png", "n", 0)
    read = []
    load = jobs.load_job
    monkeypatch.setattr(jobs, "load_job", lambda job: read.append(job) or load(job))
    kept = check_files([one] * 2)
    assert [each.take().size for each in kept] == [(8, 6)] * 2
    assert len(read) == 2
    monkeypatch.setattr(jobs, "KEPT_BYTES", 400)
    kept = check_files([one] * 2)
    assert [each.take().size for each in kept] == [(8, 6)] * 2
    assert len(read) == 5, "the second was read again in its turn"
