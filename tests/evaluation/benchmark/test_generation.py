"""A benchmark edited by one process, by two, and by one that was killed: the same files."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.multiprocessing.spawn import ProcessRaisedException

from pbe.errors import UserError
from pbe.evaluation.benchmark import generation
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.benchmark.edits import EditFolder, claim_folder, is_whole, read_settings
from pbe.evaluation.benchmark.generation import GenerateSettings, generate, groups_of, noise_of
from tests.programs import Program
from tests.ray_stand_in import StandIn

SETTINGS = GenerateSettings(
    guidance_scale=2.0, solver="ddim", steps=2, batch_size=2, accelerator="cpu", devices=1, progress=False
)


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def benchmark(bench_files) -> BenchmarkFolder:
    return BenchmarkFolder(bench_files)


@pytest.fixture(scope="module")
def edited(model, benchmark, tmp_path_factory) -> Path:
    """Edits by one process."""
    return generate(model, benchmark, tmp_path_factory.mktemp("edits") / "one", SETTINGS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_case_is_painted_in_its_hole_alone(benchmark, edited):
    assert set(contents(edited)) == {*(f"{each}.png" for each in benchmark.ids), "settings.json"}
    edits = EditFolder(edited, benchmark)
    assert len(edits) == 7
    for case, edit in zip(benchmark, edits, strict=True):
        assert edit is not None
        keep = case.mask == 0
        np.testing.assert_array_equal(edit[keep], case.image[keep])
        assert np.any(edit[~keep] != case.image[~keep])


def test_two_processes_write_the_same_files(model, benchmark, edited, tmp_path, monkeypatch):
    made = generation._trainer

    def with_imports(*arguments):
        """Start processes that have imported what takes seconds; what they need is pickled all the same."""
        trainer = made(*arguments)
        assert trainer.strategy.launcher._start_method == "spawn"
        trainer.strategy.launcher._start_method = "forkserver"
        return trainer

    monkeypatch.setattr(generation, "_trainer", with_imports)
    two = generate(model, benchmark, tmp_path / "two", dataclasses.replace(SETTINGS, devices=2))
    assert contents(two) == contents(edited)


def test_parts_on_ray_write_the_same_files(model, benchmark, edited, tmp_path, monkeypatch):
    stand_in = StandIn(CPU=2.0)
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    settings = dataclasses.replace(SETTINGS, engine="ray", devices="auto")
    out = generate(model, benchmark, tmp_path / "out", settings)
    assert contents(out) == contents(edited)
    assert stand_in.asked == [{"max_retries": 3, "num_cpus": 1}, {"num_gpus": 0}, {"num_gpus": 0}]
    for name in benchmark.ids[2:4]:  # one group of four
        (out / f"{name}.png").unlink()
    generate(model, benchmark, out, settings)
    assert contents(out) == contents(edited)
    assert stand_in.handed == 3


def test_ray_has_its_gpus_and_no_strategy(model, benchmark, tmp_path, monkeypatch):
    stand_in = StandIn(CPU=8.0, GPU=3.0)
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    parts = []
    monkeypatch.setattr(generation, "_edit", lambda task: parts.append(task.part))
    settings = dataclasses.replace(SETTINGS, engine="ray", devices="auto", accelerator="auto")
    generate(model, benchmark, tmp_path / "out", settings)
    assert parts == [(0, 3), (1, 3), (2, 3)]
    assert stand_in.asked[1:] == [{"num_gpus": 1}] * 3
    with pytest.raises(UserError, match="the cluster has its machines"):
        dataclasses.replace(settings, strategy="ddp")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        generate(model, benchmark, tmp_path / "out", settings)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_nodes_of_ray_write_the_same_files(ray_nodes, model, benchmark, edited, tmp_path):
    settings = dataclasses.replace(SETTINGS, engine="ray", devices=2)
    assert contents(generate(model, benchmark, tmp_path / "out", settings)) == contents(edited)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="gone"):
        generate(tmp_path / "gone", benchmark, tmp_path / "other", settings)


def test_killed_and_started_again_writes_the_same_files(model, benchmark, edited, tmp_path):
    out, script = tmp_path / "killed", tmp_path / "script.py"
    script.write_text(f"""
import os, signal
from pbe.evaluation.benchmark import generation
from pbe.evaluation.benchmark.generation import BenchmarkFolder, GenerateSettings
write, written = generation.write_image, []
def write_and_die(path, picture):
    if len(written) == 3:
        path.with_name(f".{{os.getpid()}}.partial").write_bytes(b"half a pic")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(path, picture))
generation.write_image = write_and_die
generation.generate({str(model)!r}, BenchmarkFolder({str(benchmark.folder)!r}), {str(out)!r}, {SETTINGS!r})
""")
    status, _, errors = Program(script, told=tmp_path).finish()
    assert status == -signal.SIGKILL, errors
    first = f"{benchmark.ids[0]}.png"
    assert len(list(out.glob("*.png"))) == 3, "the fourth case was never written"
    (out / first).write_bytes((out / first).read_bytes()[:-20])
    untouched = (out / f"{benchmark.ids[1]}.png").stat().st_mtime_ns
    generate(model, benchmark, out, SETTINGS)
    found = contents(out)
    assert {name: data for name, data in found.items() if name[0] != "."} == contents(edited)
    assert (out / f"{benchmark.ids[1]}.png").stat().st_mtime_ns == untouched


def test_complete_folder_needs_no_model_and_no_trainer(model, benchmark, edited, monkeypatch):
    monkeypatch.setattr(generation, "_trainer", None)
    assert generate(model, benchmark, edited, SETTINGS) == edited


def test_a_pipeline_gives_the_same_images_as_its_files(pipe, benchmark, edited, tmp_path):
    by_pipe = contents(generate(pipe, benchmark, tmp_path / "pipe", SETTINGS))
    wanted = contents(edited)
    assert all(by_pipe[name] == wanted[name] for name in wanted if name.endswith(".png"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": 3.0}, r"guidance_scale was 2\.0, not 3\.0"),
        ({"seed": 1}, "seed was 0, not 1"),
        ({"batch_size": 3}, "batch_size was 2, not 3"),
        ({"threads": 2}, "threads was 1, not 2"),
        ({"preserve_background": False}, "preserve_background was True, not False"),
        ({"conventions": "diffusers"}, "conventions was the model's, not diffusers"),
        ({"raw_weights": True}, "raw_weights was False, not True"),
    ],
)
def test_edits_of_other_settings_are_not_mixed(model, benchmark, edited, change, message):
    with pytest.raises(UserError, match=message):
        generate(model, benchmark, edited, dataclasses.replace(SETTINGS, **change))


def test_edits_of_another_model_or_benchmark_or_of_unknown_origin_are_refused(
    pipe, model, benchmark, edited, tmp_path
):
    with pytest.raises(UserError, match="of another model"):
        generate(pipe, benchmark, edited, SETTINGS)
    other = BenchmarkFolder(benchmark.folder)
    other.__dict__["sha256"] = "0" * 64
    with pytest.raises(UserError, match="of another benchmark"):
        generate(model, other, edited, SETTINGS)
    Image.new("RGB", (32, 32)).save(tmp_path / "stray.png")
    with pytest.raises(UserError, match=r"holds images but no settings\.json"):
        generate(model, benchmark, tmp_path, SETTINGS)
    with pytest.raises(UserError, match="nowhere"):
        generate("nowhere/model", benchmark, tmp_path / "new", SETTINGS)
    (tmp_path / "damaged").mkdir()
    for foreign in ("{", "[]", '{"format": "theirs", "settings": {}}'):
        (tmp_path / "damaged" / "settings.json").write_text(foreign)
        with pytest.raises(UserError, match="was not written by this command; name another folder"):
            generate(model, benchmark, tmp_path / "damaged", SETTINGS)
        assert (tmp_path / "damaged" / "settings.json").read_text() == foreign


def test_the_originals_protocol_lets_the_background_change(pipe, benchmark, edited, tmp_path):
    """The same noise: what is painted is the same, and the rest is what the pipeline makes of it."""
    settings = dataclasses.replace(SETTINGS, preserve_background=False, conventions="original")
    free = EditFolder(generate(pipe, benchmark, tmp_path / "free", settings), benchmark)
    kept = EditFolder(edited, benchmark)
    for case, one, other in zip(benchmark, kept, free, strict=True):
        hole = case.mask > 127
        np.testing.assert_array_equal(one[hole], other[hole])
        assert np.any(other[~hole] != case.image[~hole])
    noted = read_settings(tmp_path / "free")["settings"]
    assert (noted["preserve_background"], noted["conventions"]) == (False, "original")


def test_conventions_reach_the_pipeline(pipe, benchmark, edited, tmp_path):
    settings = dataclasses.replace(SETTINGS, conventions="diffusers")
    found = contents(generate(pipe, benchmark, tmp_path / "diffusers", settings))
    assert found[f"{benchmark.ids[0]}.png"] != contents(edited)[f"{benchmark.ids[0]}.png"]


def test_edits_noted_before_a_setting_existed_are_those_of_its_default(benchmark, tmp_path):
    model, settings = {"a": "b"}, SETTINGS.identity()
    later = ("preserve_background", "conventions", "raw_weights")
    claim_folder(tmp_path, model, benchmark, {name: settings[name] for name in settings if name not in later})
    Image.new("RGB", (32, 32)).save(tmp_path / f"{benchmark.ids[0]}.png")
    claim_folder(tmp_path, model, benchmark, settings)
    with pytest.raises(UserError, match="preserve_background was True, not False"):
        claim_folder(tmp_path, model, benchmark, settings | {"preserve_background": False})


def test_averaged_edits_are_not_added_to_those_of_plain_weights(benchmark, tmp_path):
    """Both come from one checkpoint, whose file is the same."""
    plain = dataclasses.replace(SETTINGS, raw_weights=True).identity()
    claim_folder(tmp_path, {"a": "b"}, benchmark, plain)
    Image.new("RGB", (32, 32)).save(tmp_path / f"{benchmark.ids[0]}.png")
    with pytest.raises(UserError, match="raw_weights was True, not False"):
        claim_folder(tmp_path, {"a": "b"}, benchmark, SETTINGS.identity())


def test_a_start_that_failed_does_not_bind_its_folder(benchmark, tmp_path):
    claim_folder(tmp_path, {"a": "b"}, benchmark, {"steps": 5000})
    claim_folder(tmp_path, {"a": "c"}, benchmark, {"steps": 50})
    assert read_settings(tmp_path)["settings"] == {"steps": 50}
    assert read_settings(tmp_path)["model"] == {"a": "c"}
    Image.new("RGB", (32, 32)).save(tmp_path / f"{benchmark.ids[0]}.png")
    claim_folder(tmp_path, {"a": "c"}, benchmark, {"steps": 50})
    with pytest.raises(UserError, match=r"holds other edits .*steps was 50, not 5000"):
        claim_folder(tmp_path, {"a": "c"}, benchmark, {"steps": 5000})


def test_settings_file_tells_how_to_make_the_edits_again(benchmark, edited):
    noted = json.loads((edited / "settings.json").read_text())
    assert noted["benchmark"] == benchmark.sha256
    assert noted["settings"]["steps"] == 2
    assert "devices" not in noted["settings"], "where it ran plays no part"
    assert set(noted["model"]) >= {"config.json", "unet.safetensors"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance scale is -1"),
        ({"guidance_scale": float("nan")}, "guidance scale is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 5000}, "steps is 5000; the noise schedule has no more than 1000"),
        ({"strategy": "nonsense"}, "no strategy 'nonsense'; there are: auto, .*ddp"),
        ({"num_nodes": 2}, "num_nodes is 2, but neither torchrun nor SLURM"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"devices": "many"}, "devices is 'many'"),
        ({"devices": 0}, "devices is '0'"),
        ({"solver": "magic"}, "no solver 'magic'"),
        ({"conventions": "magic"}, "no conventions 'magic'; there are: original, diffusers"),
    ],
)
def test_bad_settings(change, message, monkeypatch):
    for name in (*generation.LAUNCHED, "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_groups_depend_on_position_and_size_only():
    small, large = (32, 32), (32, 48)
    assert groups_of([small] * 3 + [large] * 2 + [small], 2) == [[0, 1], [2], [3, 4], [5]]
    assert groups_of([small] * 5, 8) == [[0, 1, 2, 3, 4]]


def test_noise_belongs_to_seed_and_id():
    draws = [torch.randn(4, generator=noise_of(*key)) for key in ((0, "1"), (0, "2"), (1, "1"), (0, "1"))]
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_edits_of_another_system_as_they_are(benchmark, edited, tmp_path):
    ids = benchmark.ids
    for position, each in enumerate(ids[:5]):
        (tmp_path / f"{position}.png").write_bytes((edited / f"{each}.png").read_bytes())
    Image.new("RGB", (16, 16)).save(tmp_path / "1.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (32, 32)).save(tmp_path / "grid.png")
    edits = EditFolder(tmp_path, benchmark)
    assert edits.extra == ["grid.png"]
    assert edits.missing == ids[5:]
    read = list(edits)
    assert [None if each is None else each.shape[0] for each in read] == [32, None, None, 32, 32, None, None]
    np.testing.assert_array_equal(read[3], EditFolder(edited, benchmark)[3])
    assert edits.faults == {ids[1]: "of another size than its case", ids[2]: "damaged"}
    assert edits.left_out == edits.faults | dict.fromkeys(ids[5:], "missing")
    assert not is_whole(tmp_path / "2.png", (32, 32))
    assert not is_whole(tmp_path / "1.png", (32, 32))
    assert is_whole(tmp_path / "0.png", (32, 32))


def test_edits_that_are_no_8_bit_rgb_are_left_out(benchmark, tmp_path):
    size, ids = (32, 32), benchmark.ids
    grey = Image.linear_gradient("L").resize(size)
    pictures = [grey.convert("I;16"), grey.convert("LA"), grey.convert("RGBA"), grey, grey.quantize(256)]
    for case, picture in zip(ids, pictures, strict=False):
        picture.save(tmp_path / f"{case}.png")
    cv2.imwrite(str(tmp_path / f"{ids[5]}.png"), np.full((32, 32, 3), 300, np.uint16))
    grey.convert("RGB").save(tmp_path / f"{ids[6]}.png", transparency=(0, 0, 0))
    edits = EditFolder(tmp_path, benchmark)
    assert [each is not None for each in edits] == [False, False, False, True, True, False, False]
    assert edits.left_out == dict.fromkeys([*ids[:3], *ids[5:]], "not an 8-bit RGB image")
    assert edits.why_not(0) == "not an 8-bit RGB image"
    for position in (3, 4):
        np.testing.assert_array_equal(edits[position], np.stack([np.array(grey)] * 3, axis=2))


def test_folders_that_are_no_edits(benchmark, edited, tmp_path):
    with pytest.raises(UserError, match=r"no edit of .*name them like 000000000000\.png"):
        EditFolder(tmp_path, benchmark)
    with pytest.raises(UserError, match="is not a folder of edits"):
        EditFolder(tmp_path / "gone", benchmark)
    for name in ("0.png", "000.png"):
        (tmp_path / name).write_bytes((edited / f"{benchmark.ids[0]}.png").read_bytes())
    with pytest.raises(UserError, match="two edits of one case"):
        EditFolder(tmp_path, benchmark)


def test_a_damaged_case_is_named(model, bench_files, tmp_path):
    folder = Path(shutil.copytree(bench_files, tmp_path / "bench"))
    Image.new("L", (32, 32)).save(folder / "Mask_bbox_3500" / "000000000002_mask.png")
    with pytest.raises(UserError, match=r"000000000002_mask\.png' is black"):
        generate(model, BenchmarkFolder(folder), tmp_path / "out", SETTINGS)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("disk full")])
def test_what_goes_wrong_comes_out_and_leaves_no_trace(
    model, benchmark, edited, tmp_path, monkeypatch, error
):
    inside = []

    def fail(*_: object) -> None:
        inside.append(signal.getsignal(signal.SIGTERM))
        raise error

    interrupts, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(generation, "write_image", fail)
            with pytest.raises(type(error)):
                generate(model, benchmark, tmp_path / "out", SETTINGS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert signal.getsignal(signal.SIGINT) is interrupts
    assert inside == [signal.getsignal(signal.SIGTERM)], "which ends an evaluation at once"
    assert contents(generate(model, benchmark, tmp_path / "out", SETTINGS)) == contents(edited)


def test_lightning_does_not_advertise(caplog):
    lightning = logging.getLogger("pytorch_lightning")
    lightning.setLevel(logging.INFO)
    inner = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    inner.addHandler(caplog.handler)
    try:
        generation._trainer(SETTINGS, 1)
    finally:
        inner.removeHandler(caplog.handler)
    assert "Tip" not in caplog.text


def test_devices_that_are_not_there_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="these devices cannot be used:"):
        generation._trainer(dataclasses.replace(SETTINGS, accelerator="gpu"), 1)


def test_the_users_error_of_another_process_stays_one_line():
    def reported(last: str) -> Exception:
        text = f"-- Process 1 terminated with the following error:\nTraceback ...\n  File x\n{last}\n"
        return generation._reported(ProcessRaisedException(text, 1, 99))

    theirs = reported("pbe.errors.UserError: 'x.png' is black")
    assert isinstance(theirs, UserError)
    assert str(theirs) == "'x.png' is black"
    assert isinstance(reported("ValueError: odd"), ProcessRaisedException)
