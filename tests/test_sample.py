"""The command line of sample.py, mostly in this process, where torch is loaded already."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.checkpoints.tensors import DTYPES
from pbe.diffusion.solvers import SOLVERS, SPACINGS
from pbe.editing.batch import runner
from pbe.editing.settings import CONVENTIONS, ConventionsName, Dtype, SolverName, SpacingName
from tests.programs import Program
from tests.sample_calls import arguments, complaint, main, pixels, write_files, write_model, written


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(tmp_path)


def test_one_edit(model: Path, files: Path, capsys: pytest.CaptureFixture[str]):
    assert main(arguments(model, files)) == 0
    assert written(files) == ["a_0.json", "a_0.png", "a_0_grid.png"]
    printed = capsys.readouterr()
    assert printed.out == f"{files}/out/a_0.png\n"
    assert "editing" in printed.err
    hole = pixels(files / "m.png") > 0
    edit, source = pixels(files / "out/a_0.png"), pixels(files / "a.png")
    np.testing.assert_array_equal(edit[~hole], source[~hole])
    assert (edit != source)[hole].mean() > 0.5


def test_the_record_holds_what_repeats_the_edit(model: Path, files: Path):
    assert (
        main(arguments(model, files, "--seed", "5", "--num-images", "2", "--solver", "ddim", "--eta", "0.5"))
        == 0
    )
    record = json.loads((files / "out/a_6.json").read_text())
    expected = {"seed": 6, "name": "a", "solver": "ddim", "steps": 4, "guidance_scale": 5.0, "eta": 0.5}
    expected |= {"preserve_background": True, "device": "cpu", "dtype": "fp32", "batch_size": 4}
    expected |= {"size": [30, 40], "edited_at": [30, 40]}
    assert {key: record[key] for key in expected} == expected
    assert record["image"]["path"] == f"{files}/a.png"
    assert all(len(record[key]["sha256"]) == 64 for key in ("image", "mask", "exemplar"))
    assert "unet.safetensors" in record["model"]["sha256"]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    again = shlex.split(record["repeat"])[2:]
    again[again.index("--out") + 1] = f"{files}/again"
    assert main(again) == 0
    difference = np.abs(pixels(files / "again/a_6.png") - pixels(files / "out/a_6.png"))
    assert difference.max() <= 1


def test_several_images_are_those_of_their_seeds_alone(model: Path, files: Path):
    assert main(arguments(model, files, "--seed", "3", "--num-images", "5", "--batch-size", "2")) == 0
    names = [f"a_{seed}.{ending}" for seed in range(3, 8) for ending in ("json", "png")]
    assert written(files) == sorted([*names, "a_3_grid.png"])
    alone = arguments(model, files, "--seed", "7", "--name", "alone")
    assert main(alone) == 0
    assert np.abs(pixels(files / "out/a_7.png") - pixels(files / "out/alone_7.png")).max() <= 1
    assert (pixels(files / "out/a_6.png") != pixels(files / "out/a_7.png")).any()


def test_the_background_may_be_given_up(model: Path, files: Path):
    assert main(arguments(model, files, "--no-preserve-background")) == 0
    hole = pixels(files / "m.png") > 0
    assert (pixels(files / "out/a_0.png") != pixels(files / "a.png"))[~hole].any()
    assert json.loads((files / "out/a_0.json").read_text())["preserve_background"] is False


def test_pairs(model: Path, files: Path):
    pair = {"image": "a.png", "mask": "m.png", "exemplar": "e.jpg"}
    lines = [pair, pair | {"name": "second", "seed": 4}, pair | {"image": "b.png"}]
    (files / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = ["--model", str(model), "--out", f"{files}/out", "--steps", "4"]
    assert main([*common, "--pairs", f"{files}/pairs.jsonl"]) == 0
    assert [name for name in written(files) if name.endswith(".json")] == [
        "0001_a_0.json",
        "0003_b_0.json",
        "second_4.json",
    ]
    assert len(written(files)) == 9
    assert pixels(files / "out/0003_b_0.png").shape == (48, 20, 3)
    assert main(arguments(model, files, "--seed", "4", "--name", "alone")) == 0
    assert np.abs(pixels(files / "out/alone_4.png") - pixels(files / "out/second_4.png")).max() <= 1


def test_a_large_image_is_edited_small_and_says_so(model: Path, files: Path):
    Image.new("RGB", (400, 300), "green").save(files / "a.png")
    assert main(arguments(model, files)) == 0
    record = json.loads((files / "out/a_0.json").read_text())
    assert (record["size"], record["edited_at"]) == ([300, 400], [32, 43])
    assert pixels(files / "out/a_0.png").shape == (300, 400, 3)


def odd_image(kind: str) -> Image.Image:
    colour = Image.new("RGB", (40, 30), "teal")
    if kind == "deep":
        return Image.fromarray(np.full((30, 40), 40_000, np.uint16))
    return colour.convert(kind) if kind != "P" else colour.quantize(4)


@pytest.mark.parametrize("kind", ["L", "1", "P", "RGBA", "LA", "CMYK", "deep"])
def test_odd_images_and_exemplars(model: Path, files: Path, kind: str):
    for name in ("a", "e"):
        odd_image(kind).save(files / f"{name}.tiff")
    call = arguments(
        model, files, "--image", f"{files}/a.tiff", "--exemplar", f"{files}/e.tiff", "--steps", "1"
    )
    assert main(call) == 0
    assert pixels(files / "out/a_0.png").shape == (30, 40, 3)


def test_an_image_turned_by_exif(model: Path, files: Path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(files / "a.png").save(files / "a.jpg", exif=exif)
    assert main(arguments(model, files, "--image", f"{files}/a.jpg")) == 0
    assert pixels(files / "out/a_0.png").shape == (40, 30, 3)


def test_a_mask_of_another_size(model: Path, files: Path):
    Image.open(files / "m.png").resize((400, 300), Image.Resampling.NEAREST).save(files / "m.png")
    assert main(arguments(model, files)) == 0
    edit, source = pixels(files / "out/a_0.png"), pixels(files / "a.png")
    changed = (edit != source).any(axis=2)
    assert changed[10:20, 10:30].mean() > 0.5
    changed[10:20, 10:30] = False
    assert not changed.any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", None, "image '.*a.png' does not exist"),
        ("m.png", b"", "mask '.*m.png' is an empty file"),
        ("e.jpg", b"\xff\xd8\xff garbage", "exemplar '.*e.jpg' is not an image of a known format"),
    ],
)
def test_files_that_cannot_be_used(
    model: Path,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    message: str,
):
    (files / name).unlink()
    if content is not None:
        (files / name).write_bytes(content)
    assert re.search(message, complaint(capsys, arguments(model, files)))
    assert not (files / "out").exists()


def test_truncated_images(model: Path, files: Path, capsys: pytest.CaptureFixture[str]):
    content = (files / "a.png").read_bytes()
    (files / "a.png").write_bytes(content[:-1500])
    assert "a.png' is damaged or cannot be decoded" in complaint(capsys, arguments(model, files))


def test_a_mask_without_hole(model: Path, files: Path, capsys: pytest.CaptureFixture[str]):
    Image.new("L", (40, 30)).save(files / "m.png")
    assert "m.png' has no masked region" in complaint(capsys, arguments(model, files))


def test_a_mask_that_is_all_hole(model: Path, files: Path):
    Image.new("L", (40, 30), 255).save(files / "m.png")
    assert main(arguments(model, files)) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--steps", "many"], 'Invalid value for --steps: unable to convert "many" into int'),
        (["--steps", "501"], "number of steps is 501; it must lie between 1 and 500"),
        (["--num-images", "0"], "--num-images is 0"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--guidance-scale", "nan"], "--guidance-scale is nan"),
        (["--eta", "1.5"], "--eta is 1.5"),
        (["--eta", "0.5"], "plms is deterministic: eta must be 0"),
        (["--eta", "0.5", "--solver", "euler"], "--eta above 0 is for --solver ddim and lcm, not euler"),
        (["--margin", "-1"], "--margin is -1.0; it must lie between 0 and 65535"),
        (["--feather", "inf"], "--feather is inf"),
        (["--height", "0"], "--height is 0; it must be at least 1"),
        (["--region", "left"], 'Invalid value "left" for --region. Choose from: "full", "mask"'),
        (["--spacing", "wide"], 'Invalid value "wide" for --spacing'),
        (["--solver", "plms", "--karras"], "plms has no Karras sigmas"),
        (["--conventions", "mine"], 'Invalid value "mine" for --conventions'),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--safety-checker", "/nowhere"], "--safety-checker '/nowhere' does not exist"),
        (["--output", "x.png"], "give --out (a folder) or --output"),
        (["--cpu-offload", "--device", "cpu"], "CPU offload needs an"),
        (["--solver", "magic"], 'Invalid value "magic" for --solver. Choose from: "plms"'),
        (["--device", "abacus"], "--device 'abacus' cannot be used here"),
        (["--dtype", "int8"], 'Invalid value "int8" for --dtype'),
        (["--dtype", "float32"], 'Choose from: "fp32", "bf16", "fp16"'),
        (["--seed", "9" * 5000], "Invalid value for --seed"),
        (["--name", "a/b"], "name 'a/b' cannot be the name of a file"),
        (["--pairs", "x.jsonl"], "--pairs and --image cannot go together"),
        (
            ["--model", "/nowhere"],
            "--model '/nowhere' does not exist; give a model's folder, a checkpoint file",
        ),
        (["--fast"], "Unknown option: --fast"),
    ],
)
def test_arguments_that_cannot_be_used(
    model: Path, files: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
):
    assert message in complaint(capsys, arguments(model, files, *more))


def test_missing_arguments(model: Path, files: Path, capsys: pytest.CaptureFixture[str]):
    short = ["--model", str(model), "--out", str(files), "--mask", "m.png"]
    assert "--image, --exemplar missing" in complaint(capsys, short)
    assert "--model requires an argument" in complaint(capsys, [])


def test_an_output_that_is_a_file(model: Path, files: Path, capsys: pytest.CaptureFixture[str]):
    (files / "out").touch()
    assert "cannot make the folder" in complaint(capsys, arguments(model, files))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such file names")
def test_an_image_whose_file_name_is_not_utf_8(model: Path, files: Path, capsys: pytest.CaptureFixture[str]):
    latin = os.fsdecode(os.fsencode(files) + b"/caf\xe9.png")
    (files / "a.png").rename(latin)
    assert r"name 'caf\udce9' is not Unicode text; give" in complaint(
        capsys, arguments(model, files, "--image", latin)
    )
    assert main(arguments(model, files, "--image", latin, "--name", "cafe", "--steps", "1")) == 0
    assert json.loads((files / "out/cafe_0.json").read_text())["image"]["path"] == latin


def test_a_damaged_model(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    (tmp_path / "broken/unet.safetensors").touch()
    assert "not valid JSON" in complaint(capsys, arguments(tmp_path / "broken", files))


def test_pairs_are_checked_before_anything_is_edited(
    model: Path, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object) -> None:
        raise AssertionError("sampling started")

    monkeypatch.setattr(runner, "edit_all", never)
    pair = {"image": "a.png", "mask": "m.png", "exemplar": "e.jpg"}
    common = ["--model", str(model), "--out", f"{files}/out", "--pairs", f"{files}/pairs.jsonl"]
    for second, message in (
        ("{broken", "pairs.jsonl line 2: not valid JSON"),
        (json.dumps(pair | {"mask": "none.png"}), "pairs.jsonl line 2: mask '"),
        (json.dumps(pair | {"name": "0001_a"}), "pairs.jsonl line 2: '0001_a_0' is already the output"),
    ):
        (files / "pairs.jsonl").write_text(json.dumps(pair) + "\n" + second + "\n")
        assert message in complaint(capsys, common)


def test_an_interrupt_is_exit_130(model: Path, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "edit_batch", interrupt)
    assert main(arguments(model, files)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_the_names_of_the_command_line_are_those_of_the_package():
    assert set(get_args(SolverName)) == set(SOLVERS)
    assert set(get_args(SpacingName)) == set(SPACINGS)
    assert set(get_args(ConventionsName)) == set(CONVENTIONS)
    assert get_args(Dtype) == tuple(DTYPES)
    assert [DTYPES[name].itemsize for name in DTYPES] == [4, 2, 2]


def sample(project_root: Path, *call: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(project_root / "sample.py"), *call]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=project_root)


def test_help_and_complaints_need_no_torch(project_root: Path):
    script = "import sys; from pbe.cli.main import main; code = main(['edit']); "
    script += "sys.exit(3 if 'torch' in sys.modules else code)"
    bare = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=project_root)
    assert bare.returncode == 2, bare.stderr
    helped = sample(project_root, "--help")
    assert helped.returncode == 0
    assert "--guidance-scale" in helped.stdout
    assert helped.stderr == ""


def test_a_complaint_of_the_script(project_root: Path, model: Path, files: Path):
    wrong = sample(project_root, *arguments(model, files, "--image", "/nowhere.png"))
    assert (wrong.returncode, wrong.stderr) == (2, "error: image '/nowhere.png' does not exist\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_script_edits_until_ctrl_c(project_root: Path, model: Path, files: Path):
    call = arguments(model, files, "--num-images", "5000", "--batch-size", "1")
    process = Program(project_root / "sample.py", *call, told=files)
    deadline = time.monotonic() + 100
    while not (files / "out/a_1.png").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    status, printed, errors = process.finish(30)
    assert status == 130, errors
    assert "Traceback" not in errors
    assert errors.rstrip().endswith("interrupted")
    assert printed.splitlines()[0] == f"{files}/out/a_0.png"
    assert pixels(files / "out/a_0.png").shape == (30, 40, 3)
    assert not list((files / "out").glob(".*"))


def test_a_preset_is_recorded_as_what_it_stands_for(model: Path, files: Path):
    fast = ("--preset", "draft", "--guidance-interval", "0.1", "0.9", "--reuse-features", "2")
    assert main(arguments(model, files, *fast)) == 0
    record = json.loads((files / "out/a_0.json").read_text())
    expected = {"solver": "dpmpp_2m", "spacing": "trailing", "steps": 4, "reuse_features": 2}
    assert {key: record[key] for key in expected} == expected
    assert record["guidance_interval"] == [0.1, 0.9]
    again = shlex.split(record["repeat"])[2:]
    again[again.index("--out") + 1] = f"{files}/again"
    assert main(again) == 0
    np.testing.assert_array_equal(pixels(files / "again/a_0.png"), pixels(files / "out/a_0.png"))
    assert main(arguments(model, files, "--preset", "fast")) == 2


def test_compiling_without_a_compiler_is_one_line(
    model: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    told = complaint(capsys, arguments(model, files, "--compile", "--quiet"))
    assert "compile needs a C++ compiler, and there is no '/nowhere/g++'; install g++" in told
    assert "or leave compile out" in told
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(files))
    assert "there is no 'g++'" in complaint(capsys, arguments(model, files, "--compile", "--quiet"))
    assert written(files) == []
