"""Options of sample.py beyond a plain edit into a folder."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from pbe.config import Config, to_dict
from pbe.editing.batch.runner import memory_errors
from pbe.errors import UserError
from tests.editing.tiny_model import make_tiny_model
from tests.programs import Program
from tests.sample_calls import arguments, complaint, main, pixels, write_files, write_model


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


def write_run(folder: Path) -> Path:
    """A run with a checkpoint whose average is another model than its plain weights."""
    plain, average = make_tiny_model(seed=1), make_tiny_model()
    states = {"state_dict": plain.state_dict(), "ema": average.state_dict()}
    content = {
        name: {f"model.{key}": value for key, value in state.items()} for name, state in states.items()
    }
    (folder / "checkpoints").mkdir(parents=True)
    config = to_dict(replace(Config(), model=plain.config))
    torch.save(content | {"config": config, "global_step": 1}, folder / "checkpoints/last.ckpt")
    (folder / "metrics.json").write_text("[]")
    return folder


def test_a_run_is_repeated_with_the_weights_that_were_taken(files: Path):
    run = write_run(files / "run")
    edits = {}
    for name, more in {"average": [], "plain": ["--raw-weights"]}.items():
        assert main(arguments(run, files, "--name", name, "--quiet", *more)) == 0
        record = json.loads((files / f"out/{name}_0.json").read_text())
        assert list(record["model"]["sha256"]) == ["last.ckpt"]
        again = shlex.split(record["repeat"])[2:]
        assert ("--raw-weights" in again) == bool(more)
        again[again.index("--out") + 1] = f"{files}/again"
        assert main(again) == 0
        edits[name] = pixels(files / f"out/{name}_0.png")
        assert np.abs(pixels(files / f"again/{name}_0.png") - edits[name]).max() <= 1
    assert np.abs(edits["plain"] - edits["average"]).max() > 10


ODD = "my data [v2] {a,b} (1) 50% me@home é ~x"


def test_odd_signs_in_paths_are_taken_as_they_are(
    model: Path, files: Path, capsys: pytest.CaptureFixture[str]
):
    place = files / ODD
    place.mkdir()
    for name in ("a.png", "m.png", "e.jpg"):
        shutil.copy(files / name, place / f"{ODD} {name}")
    shutil.copytree(model, place / "model")
    (files / "a.png").unlink()
    inputs = {"image": "a.png", "mask": "m.png", "exemplar": "e.jpg"}
    call = ["--model", str(place / "model"), "--steps", "1", "--quiet"]
    for key, name in inputs.items():
        call += [f"--{key}", f"{place}/{ODD} {name}"]
    assert main([*call, "--out", f"{place}/out"]) == 0
    assert main([*call, "--output", f"{place}/{ODD}.png"]) == 0
    expected = pixels(place / f"out/{ODD} a_0.png")
    np.testing.assert_array_equal(pixels(place / f"{ODD}.png"), expected)
    pair = {key: f"{ODD} {name}" for key, name in inputs.items()}
    (place / f"{ODD}.jsonl").write_text(json.dumps(pair))
    pairs = ["--model", str(place / "model"), "--pairs", f"{place}/{ODD}.jsonl", "--steps", "1"]
    assert main([*pairs, "--out", f"{place}/out"]) == 0
    np.testing.assert_array_equal(pixels(place / f"out/0001_{ODD} a_0.png"), expected)


def test_the_home_folder_in_every_path(model: Path, files: Path, monkeypatch: pytest.MonkeyPatch):
    (files / "work").mkdir()
    monkeypatch.chdir(files / "work")
    monkeypatch.setenv("HOME", str(files))
    shutil.copytree(model, files / "model")
    inputs = ["--image=~/a.png", "--mask=~/m.png", "--exemplar=~/e.jpg"]
    assert main(["--model=~/model", *inputs, "--out=~/out", "--steps=1", "--cache-dir=~/cache"]) == 0
    assert main(["--model=~/model", *inputs, "--output=~/one.png", "--steps=1"]) == 0
    pair = {"image": "~/a.png", "mask": "~/m.png", "exemplar": "~/e.jpg"}
    (files / "pairs.jsonl").write_text(json.dumps(pair))
    assert main(["--model=~/model", "--pairs=~/pairs.jsonl", "--out=~/out", "--steps=1"]) == 0
    assert (files / "out/0001_a_0.png").is_file()
    assert (files / "one.png").is_file()
    assert list((files / "work").iterdir()) == []


def test_profile_and_resolution_go_along(model: Path, files: Path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.open(files / "a.png").save(files / "a.png", icc_profile=profile, dpi=(300, 300))
    assert main(arguments(model, files, "--steps", "1")) == 0
    call = arguments(model, files, "--steps", "1")
    del call[call.index("--out") : call.index("--out") + 2]
    made = [files / "out/a_0.png", files / "out/a_0_grid.png"]
    for ending in ("jpg", "webp", "tif"):
        made.append(files / f"one.{ending}")
        assert main([*call, "--output", str(made[-1])]) == 0
    for path in made:
        info = Image.open(path).info
        assert info["icc_profile"] == profile, path
        if path.suffix != ".webp":  # which has no place for it
            assert round(float(info["dpi"][0])) == 300, path


def test_what_decided_about_masks_is_told_and_recorded(
    model: Path, files: Path, capsys: pytest.CaptureFixture[str]
):
    layer = np.zeros((30, 40, 4), np.uint8)
    layer[..., 3] = 255
    layer[10:20, 10:30, :3] = 255
    layer[0, 0, 3] = 0
    Image.fromarray(layer).save(files / "m.png")
    assert main(arguments(model, files, "--steps", "1", "--quiet")) == 0
    told = "read by luminance times alpha, it repaints 16.7% of the image"
    assert f"mask '{files}/m.png': {told}\n" in capsys.readouterr().err
    mask = json.loads((files / "out/a_0.json").read_text())["mask"]
    assert (mask["read_by"], mask["repaints"]) == ("luminance times alpha", 0.166667)
    pair = json.dumps({"image": "a.png", "mask": "m.png", "exemplar": "e.jpg"})
    (files / "pairs.jsonl").write_text("\n".join([pair] * 3))
    call = ["--model", str(model), "--pairs", f"{files}/pairs.jsonl", "--out", f"{files}/out", "--steps", "1"]
    assert main([*call, "--quiet"]) == 0
    assert (
        f"pairs.jsonl line 1: mask '{files}/m.png': {told} (and 2 more like it)\n" in capsys.readouterr().err
    )


def test_a_file_of_damaged_metadata_is_edited_without_a_word(project_root: Path, model: Path, files: Path):
    exif = bytearray(b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"\x12\1\3\0\1\0\0\0\6\0\0\0" + b"\x0e\1")
    Image.open(files / "a.png").save(files / "a.jpg", exif=bytes(exif))
    Image.open(files / "m.png").transpose(Image.Transpose.ROTATE_270).save(files / "m.png")
    call = arguments(model, files, "--image", f"{files}/a.jpg", "--steps", "1", "--quiet")
    status, _, errors = Program(project_root / "sample.py", *call, told=files).finish()
    assert status == 0, errors
    assert [line for line in errors.splitlines() if "no safety checker" not in line] == []
    assert pixels(files / "out/a_0.png").shape == (40, 30, 3), "what can be read of the EXIF counts"


def test_an_output_too_large_for_its_format(model: Path, files: Path, capsys: pytest.CaptureFixture[str]):
    call = arguments(model, files, "--height", "20000")
    del call[call.index("--out") : call.index("--out") + 2]
    message = "the edit has 40x20000 pixels, a .webp file at most 16383 a side"
    assert message in complaint(capsys, [*call, "--output", f"{files}/new.webp"])


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_one_line(error: Exception):
    with pytest.raises(UserError, match="out of memory: a smaller --batch-size"), memory_errors():
        raise error
    with pytest.raises(RuntimeError, match="a defect"), memory_errors():
        raise RuntimeError("a defect")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "meta"], "--device 'meta' cannot be used here: it holds no numbers"),
        (["--device", ""], "--device '' cannot be used here"),
        (["--device", "gpu"], "--device 'gpu' cannot be used here: there is no such device; name cpu, cuda"),
        (["--height", "99999999999999999999"], "--height is 99999999999999999999; it must be at most 65535"),
        (["--margin", "1e300"], "--margin is 1e+300; it must lie between 0 and 65535"),
        (["--num-images", "1000000000000"], "--num-images is 1000000000000; it must be at most 1000000"),
        (["--image", "/dev/zero"], "image '/dev/zero' is not a regular file"),
        (["--seed", str(2**64)], f"--seed is {2**64}; it must lie between 0 and"),
        (["--steps", "2.0"], "--steps is 2.0; it must be a whole number"),
        (["--height", "2.5"], "--height is 2.5; it must be a whole number"),
    ],
)
def test_values_that_no_computer_can_use(
    model: Path, files: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
):
    assert message in complaint(capsys, arguments(model, files, *more))
