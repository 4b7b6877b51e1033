"""What the demo's page shows: images at a size to look at, headline numbers, photographs from outside."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from pbe.errors import UserError
from pbe.evaluation.benchmark.generation import GenerateSettings
from pbe.evaluation.benchmark.toy import ToyEdits
from pbe.evaluation.demo.page import (
    TILE,
    Student,
    edit_outside,
    edit_strips,
    machine_facts,
    smooth,
    training_chart,
)
from pbe.evaluation.report import at_side
from pbe.evaluation.study.naming import readable

FOLDER = Path("data/examples/outside")


@pytest.mark.parametrize("points", [[], [(0, float("nan"))], [(0, 1.0), (1, float("inf"))]])
def test_a_chart_without_numbers_is_refused(points):
    good = [(0, 1.0), (1, 0.5)]
    for curves in ((points, good), (good, points)):
        with pytest.raises(UserError, match="losses of the training run are missing"):
            training_chart(*curves)


def test_the_chart_is_the_same_svg_each_time():
    chart = training_chart([(0, 2.0), (100, 1.0)], [(0, 2.0), (50, 1.5), (100, 1.0)])
    assert chart == training_chart([(0, 2.0), (100, 1.0)], [(0, 2.0), (50, 1.5), (100, 1.0)])
    svg = base64.b64decode(chart.removeprefix("data:image/svg+xml;base64,")).decode()
    for text in ("training, running mean", "validation, fixed grid", "optimizer step", "mean squared error"):
        assert text in svg


def test_smoothing_by_hand():
    points = [(float(i), float(v)) for i, v in enumerate([4, 2, 0, 6])]
    assert smooth(points, share=0.5) == [(0.0, 4.0), (1.0, 3.0), (2.0, 1.0), (3.0, 3.0)]


def test_machine_facts_name_versions():
    facts = dict(machine_facts())
    assert facts["torch"].startswith("2.")
    assert facts["Processor"]


def test_strips_are_the_first_cases_in_the_benchmarks_order(cases):
    edits = np.stack([np.full_like(case.image, 9 * place) for place, case in enumerate(cases)])
    made = ToyEdits({1.0: edits, 5.0: edits + 1}, {1.0: edits, 5.0: edits}, np.arange(6), edits)
    student = Student(ToyEdits({2.0: edits + 2}, {2.0: edits}, np.arange(6), edits), 4, 0.1, 102, 2.5)
    assert [len(strip) for strip in edit_strips(cases, made, None, 2)] == [5, 5]
    strips = edit_strips(cases, made, student, 4)
    assert len(strips) == 4
    for place, strip in enumerate(strips):
        captions = [
            "masked",
            "exemplar",
            "guidance 1",
            "guidance 5",
            "4 steps",
            f"hidden: {readable(cases[place].name)}",
        ]
        assert [tile.caption for tile in strip] == captions
        assert {tile.image.shape for tile in strip} == {(TILE, TILE, 3)}
        assert np.all(strip[3].image == 9 * place + 1)
        assert np.all(strip[4].image == 9 * place + 2)
    rows = made.rows(cases)
    assert list(rows) == [
        "masked",
        "exemplar",
        "guidance 1",
        "guidance 5",
        "shuffled exemplar",
        "its edit, guidance 5",
        "source: true object",
    ]
    assert np.array_equal(rows["guidance 5"], edits + 1)


@pytest.mark.parametrize("kind", ["image", "exemplar"])
@pytest.mark.parametrize("name", ["cat_for_cup", "cup_for_helmet"])
def test_photographs_are_what_their_note_says(project_root: Path, name: str, kind: str):
    """The files are the named squares of scikit-image's photographs."""
    file = f"{name}_{kind}.png"
    note = (project_root / FOLDER / "LICENCES.md").read_text()
    found = re.search(rf"{file} \| `(\w+)` \| (\d+), (\d+), (\d+) \|", note)
    assert found is not None
    left, top, side = (int(found[place]) for place in (2, 3, 4))
    part = Image.fromarray(getattr(data, found[1])()).crop((left, top, left + side, top + side))
    with Image.open(project_root / FOLDER / file) as image:
        expected = part.resize(image.size, Image.Resampling.LANCZOS)
        assert image.size == ((64, 64) if kind == "image" else (128, 128))
        # Pillow's filters may round a level differently between versions
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def test_edits_outside_keep_the_photograph_around_the_mask(project_root: Path, pipe):
    settings = GenerateSettings(solver="ddim", steps=1, seed=5)
    strips = edit_outside(pipe, project_root / FOLDER / "pairs.jsonl", (1.0, 3.0), settings)
    assert [tile.caption for tile in strips[0]] == [
        "masked",
        "exemplar",
        "guidance 1",
        "guidance 3",
        "photograph",
    ]
    image = Image.open(project_root / FOLDER / "cat_for_cup_image.png")
    mask = Image.open(project_root / FOLDER / "cat_for_cup_mask.png")
    exemplar = Image.open(project_root / FOLDER / "cat_for_cup_exemplar.png")
    draw = torch.Generator().manual_seed(5)
    edit = pipe(
        exemplar, image, mask, num_inference_steps=1, guidance_scale=3.0, generator=draw, solver="ddim"
    )
    assert np.array_equal(strips[0][3].image, at_side(np.asarray(edit.images[0]), TILE))
    with pytest.raises(UserError, match="cannot be read"):
        edit_outside(pipe, project_root / "nowhere.jsonl", (1.0,), settings)
