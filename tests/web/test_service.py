"""The queue: batches, their bits, cancelling, limits."""

from __future__ import annotations

import io
import json
import shlex
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.web.conftest import EXAMPLES, need_web

need_web()

from pbe.cli.main import main  # noqa: E402
from pbe.diffusion.solvers import SolverChoice  # noqa: E402
from pbe.errors import UserError  # noqa: E402
from pbe.web.records import (  # noqa: E402
    Inputs,
    archive,
    command,
    mask_hint,
    read_inputs,
    read_record,
    read_settings,
    record,
    split,
)
from pbe.web.service import BusyError, EditService, Made  # noqa: E402

WAIT = 120


def inputs_of(number: int, editor: Any) -> Inputs:
    files = [(EXAMPLES / f"{number}_{kind}.png").read_bytes() for kind in ("image", "mask", "exemplar")]
    return read_inputs(files[0], files[1], files[2:], editor.settings)


@pytest.mark.parametrize(
    "chosen",
    [
        {"solver": "dpmpp_sde"},
        {"preset": "draft", "guidance_interval": (0.25, 0.8), "reuse_features": 2, "region": "mask"},
    ],
    ids=["noisy", "fast"],
)
def test_every_edit_of_a_batch_is_what_its_command_makes(
    chosen: dict[str, Any], editor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read_settings(chosen | {"steps": 4, "seed": 5}, editor.settings)
    inputs = [inputs_of(number, editor) for number in range(4)]
    edits = [
        split(each, replace(settings, seed=5 + number), editor.settings, watched=True)[0]
        for number, each in enumerate(inputs)
    ]
    editor.service.submit(edits)
    results = [
        editor.finish(edit, each) for edit, each in zip(edits, inputs, strict=True) if edit.done.result(WAIT)
    ]
    assert {each.record["batch_size"] for each in results} == {4}
    last = results[-1]
    content = archive(last.edit, last.content, last.carried, last.record)
    with zipfile.ZipFile(io.BytesIO(content)) as files:
        files.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(last.record["repeat"])
    assert words[:2] == ["pbe", "edit"]
    assert main([*words[1:], "--quiet"]) == 0
    repeated = np.asarray(Image.open(tmp_path / "repeated/edit_8.png"))
    assert np.array_equal(repeated, np.asarray(Image.open(tmp_path / "edit_8.png")))
    assert not np.array_equal(repeated, np.asarray(Image.open(tmp_path / "image.png")))
    told = read_record((tmp_path / "settings.json").read_text(), editor.settings)
    assert replace(told, seed=5, conventions=None) == settings


def test_a_preset_obeys_the_limits(editor: Any) -> None:
    few = replace(editor.settings, max_steps=7)
    with pytest.raises(UserError, match="this server takes at most 7"):
        read_settings({"preset": "draft"}, few)
    assert read_settings({"preset": "draft", "steps": 7}, few).steps == 7


def test_the_command_names_what_differs_from_the_defaults(editor: Any) -> None:
    settings = read_settings(
        {"steps": 3, "region": "mask", "feather": 2.5, "preserve_background": False}, editor.settings
    )
    words = command(vars(settings), 1, editor.settings, "cpu")
    assert words.endswith("--steps 3 --seed 0 --region mask --feather 2.5 --no-preserve-background")


def test_a_solver_of_the_models_own_settings_goes_by_no_name(editor: Any) -> None:
    """By its name alone the command, and the page that reads the record, would take another one."""
    edit = split(inputs_of(0, editor), read_settings({}, editor.settings), editor.settings)[0]
    made, usual = Made(Image.new("RGB", (4, 4)), False, 1), editor.pipe.choice
    plain = record(edit, made, editor.pipe, editor.settings)
    assert plain["solver"] == usual.name
    try:
        editor.pipe.solver = SolverChoice("ddim", spacing="trailing", clip=1.0)
        own = record(edit, made, editor.pipe, editor.settings)
    finally:
        editor.pipe.solver = usual
    assert own["solver"] is None
    assert own["model_solver"] == {"name": "ddim", "spacing": "trailing", "settings": {"clip": 1.0}}
    assert "--solver" not in own["repeat"]
    assert read_record(json.dumps(own), editor.settings).solver is None


def test_a_result_keeps_no_image_that_its_size_leaves_out(editor: Any) -> None:
    inputs = inputs_of(0, editor)
    edit = split(inputs, read_settings({}, editor.settings), editor.settings)[0]
    edit.done.set_result(Made(Image.new("RGB", (64, 64)), False, 1))
    edit.preview = np.zeros((64, 64, 3), np.uint8)
    kept = editor.finish(edit, inputs).edit
    assert not kept.done.done()
    assert kept.preview is None
    assert kept.image is edit.image


class Slow:
    """A pipeline whose edits wait to be let go."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.batches = pipe, []
        self.noise_schedule, self.solver, self.choice = pipe.noise_schedule, pipe.solver, pipe.choice
        self.device = pipe.device

    def solver_steps(self, *_: Any) -> int:
        return 3

    def edit(self, exemplars: list[Any], *_: Any, callback: Any, **__: Any) -> Any:
        import torch

        self.batches.append(len(exemplars))
        for step in range(10_000):
            callback(step, 500.0, torch.zeros(len(exemplars), 4, 8, 8))
            if step > 2 and len(self.batches) > 1:
                break
        images = [Image.new("RGB", (64, 64)) for _ in exemplars]
        return type("Output", (), {"images": images, "nsfw_content_detected": None})()


@pytest.mark.parametrize(
    ("threads", "device", "most"),
    [(1, "cpu", 4), (2, "cpu", 4), (6, "cpu", 1), (8, "cpu", 4), (6, "cuda", 4)],
)
def test_edits_run_alone_where_threads_would_share_them_out_unevenly(
    editor: Any, monkeypatch: pytest.MonkeyPatch, threads: int, device: str, most: int
) -> None:
    import torch

    pipe = Slow(editor.pipe)
    pipe.device = torch.device(device)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    service = EditService(pipe, batch_size=5, max_queue=3)  # type: ignore[arg-type]
    service.close(5.0)
    assert service.batch_size == most


def test_a_full_queue_refuses_and_cancelling_frees_it(editor: Any) -> None:
    pipe = Slow(editor.pipe)
    service = EditService(pipe, batch_size=2, max_queue=3)  # type: ignore[arg-type]
    settings = read_settings({"steps": 3}, editor.settings)
    inputs = inputs_of(0, editor)
    first = split(inputs, settings, editor.settings)
    service.submit(first)
    while not first[0].steps:
        pass
    waiting = [split(inputs, settings, editor.settings)[0] for _ in range(3)]
    service.submit(waiting)
    assert service.ahead_of(waiting[2]) == 2
    with pytest.raises(BusyError, match="queue is full"):
        service.submit(split(inputs, settings, editor.settings))
    service.cancel(waiting[:1])
    assert waiting[0].done.cancelled()
    service.cancel(first)
    with pytest.raises(BusyError, match="cancelled"):
        first[0].done.result(WAIT)
    assert [edit.done.result(WAIT).rows for edit in waiting[1:]] == [2, 2]
    assert pipe.batches == [1, 2]
    service.close(5.0)
    with pytest.raises(BusyError, match="stopping"):
        service.submit(first)


def test_an_edit_whose_future_was_cancelled_disturbs_nobody(editor: Any) -> None:
    settings = read_settings({"steps": 1}, editor.settings)
    edits = [split(inputs_of(0, editor), settings, editor.settings)[0] for _ in range(3)]
    edits[0].done.cancel()
    edits[2].done.cancel()
    editor.service.submit(edits)
    assert edits[1].done.result(WAIT).rows == 1


def test_an_edit_that_is_cancelled_as_it_is_taken_disturbs_nobody(editor: Any) -> None:
    class Racing(EditService):
        looks = 0

        def _matching(self) -> list[Any]:
            found, self.looks = super()._matching(), self.looks + 1
            if self.looks == 2:
                found[0].done.cancel()
            return found

    service, settings = Racing(editor.pipe, 2, 4), read_settings({"steps": 1}, editor.settings)
    edits = [split(inputs_of(0, editor), settings, editor.settings)[0] for _ in range(2)]
    service.submit(edits)
    assert edits[1].done.result(WAIT).rows == 1
    service.close(5.0)


def test_edits_of_other_sizes_or_settings_do_not_share_a_batch(editor: Any) -> None:
    inputs = inputs_of(0, editor)
    small = replace(inputs, image=inputs.image[:40], mask=inputs.mask[:40])
    settings = read_settings({"seed": 1}, editor.settings)
    key = split(inputs, settings, editor.settings)[0].key
    assert key == split(inputs, replace(settings, seed=9), editor.settings)[0].key
    assert key != split(small, settings, editor.settings)[0].key
    assert key != split(inputs, replace(settings, steps=4), editor.settings)[0].key


def test_previews_come_close_to_the_edit(editor: Any) -> None:
    for solver in ("ddim", "euler"):
        settings = read_settings({"steps": 12, "solver": solver}, editor.settings)
        edit = split(inputs_of(0, editor), settings, editor.settings, watched=True)[0]
        editor.service.submit([edit])
        made = np.asarray(edit.done.result(WAIT).image).astype(int)
        assert edit.preview is not None
        inside = edit.mask
        assert np.abs(edit.preview.astype(int) - made)[inside].mean() < 40


def test_a_mask_that_leaves_nothing_to_see_is_told(editor: Any) -> None:
    inputs = inputs_of(0, editor)
    settings = read_settings({}, editor.settings)
    assert mask_hint(inputs, settings, 64) is None
    everything = replace(inputs, mask=np.ones_like(inputs.mask))
    assert "100% of the image" in str(mask_hint(everything, settings, 64))
    box = np.zeros((64, 64), bool)
    box[8:40, 8:40] = True
    tight = replace(settings, region="mask", margin=0.0)
    assert "raise the margin" in str(mask_hint(replace(inputs, mask=box), tight, 64))
    assert mask_hint(replace(inputs, mask=box), replace(tight, margin=0.5), 64) is None


def test_settings_come_back_from_records(editor: Any) -> None:
    text = '{"steps": 7, "solver": "ddim", "eta": 0.5, "seed": 3, "batch_size": 4, "model": {"folder": "x"}}'
    settings = read_record(text, editor.settings)
    assert (settings.steps, settings.solver, settings.eta, settings.seed) == (7, "ddim", 0.5, 3)
    for broken, said in (
        ("{", "not JSON"),
        ("[1]", "no settings"),
        ('{"a": 1}', "no settings"),
        ('{"solver": "magic"}', "no solver 'magic'"),
        ('{"seed": "x"}', "seed is 'x'"),
        ('{"steps": 1e99}', "steps is"),
        ('{"steps": [3]}', "steps"),
    ):
        with pytest.raises(UserError, match=said):
            read_record(broken, editor.settings)
