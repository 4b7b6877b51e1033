"""What the demo's page shows: images at a size to look at, headline numbers, photographs from outside."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from pbe.errors import UserError
from pbe.evaluation.benchmark.sheets import at_side, edit_rows
from pbe.evaluation.benchmark.toy_edits import BenchmarkEdits, EditSettings
from pbe.evaluation.demo.page import TILE, edit_outside, edit_strips
from pbe.evaluation.study.naming import readable

FOLDER = Path("data/examples/outside")


def test_small_images_are_enlarged_by_lanczos_and_large_ones_averaged():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((40, 40), Image.Resampling.LANCZOS)
    assert np.array_equal(at_side(image, 40), np.asarray(expected))
    assert np.array_equal(at_side(image, 16), image)
    blocks = image.reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(at_side(image, 8) - blocks).max() <= 0.51


def test_strips_are_the_first_cases_in_the_benchmarks_order(cases):
    edits = np.stack([np.full_like(case.image, 9 * place) for place, case in enumerate(cases)])
    made = BenchmarkEdits({1.0: edits, 5.0: edits + 1}, {1.0: edits, 5.0: edits}, np.arange(6), edits)
    strips = edit_strips(cases, made, 4)
    assert len(strips) == 4
    for place, strip in enumerate(strips):
        captions = [
            "masked",
            "exemplar",
            "guidance 1",
            "guidance 5",
            f"hidden: {readable(cases[place].name)}",
        ]
        assert [tile.caption for tile in strip] == captions
        assert {tile.picture.shape for tile in strip} == {(TILE, TILE, 3)}
        assert np.all(strip[3].picture == 9 * place + 1)
    rows = edit_rows(cases, made)
    assert list(rows) == ["masked", "exemplar", "edit", "hidden"]
    assert np.array_equal(rows["edit"], edits + 1)


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
    settings = EditSettings((1.0, 3.0), "ddim", 1, seed=5)
    strips = edit_outside(pipe, project_root / FOLDER / "pairs.jsonl", settings)
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
    assert np.array_equal(strips[0][3].picture, at_side(np.asarray(edit.images[0]), TILE))
    with pytest.raises(UserError, match="cannot be read"):
        edit_outside(pipe, project_root / "nowhere.jsonl", settings)
