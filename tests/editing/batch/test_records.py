from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.editing.batch.records import (
    GAP,
    make_grid,
    model_digests,
    repeat_command,
    versions,
    write_image,
    write_json,
)
from pbe.errors import UserError


def test_the_grid_shows_source_masked_exemplar_and_edits():
    source = np.full((20, 30, 3), 200, np.uint8)
    hole = np.zeros((20, 30), bool)
    hole[5:10, 5:10] = True
    edits = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    grid = np.asarray(make_grid(source, hole, np.zeros((40, 40, 3), np.uint8), edits))
    assert grid.shape == (20, 5 * (30 + GAP) - GAP, 3)
    step = 30 + GAP
    assert grid[7, 7].tolist() == [200] * 3
    assert grid[7, step + 7].tolist() == [128] * 3
    assert grid[10, 2 * step + 15].tolist() == [0] * 3
    assert grid[10, 2 * step + 1].tolist() == [255] * 3  # the exemplar keeps its aspect
    assert grid[7, 3 * step + 7].tolist() == [255, 0, 0]
    assert grid[7, 4 * step + 7].tolist() == [0, 0, 255]


def test_large_and_long_grids_stay_handy():
    source, hole = np.zeros((1000, 2000, 3), np.uint8), np.ones((1000, 2000), bool)
    grid = make_grid(source, hole, source, [Image.new("RGB", (2000, 1000))] * 9)
    assert grid.size == (7 * (512 + GAP) - GAP, 2 * (256 + GAP) - GAP)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path):
    write_image(tmp_path / "a.png", Image.new("RGB", (3, 3)))
    write_json(tmp_path / "a.json", {"é": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]
    assert (tmp_path / "a.json").read_text() == '{\n  "é": 1\n}\n'
    with pytest.raises(UserError, match="cannot write"):
        write_image(tmp_path / "none" / "a.png", Image.new("RGB", (3, 3)))
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_image(tmp_path / "b.png", Image.new("RGB", (3, 3)))
    assert len(list(tmp_path.iterdir())) == 3


def test_digests_and_versions(tmp_path: Path):
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "unet.safetensors").write_bytes(b"weights")
    (tmp_path / "notes.txt").write_bytes(b"no matter")
    digests = model_digests(tmp_path)
    assert list(digests) == ["config.json", "unet.safetensors"]
    assert digests["unet.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert {"python", "torch", "numpy", "pillow"} <= versions().keys()


def test_the_command_survives_odd_names():
    command = repeat_command({"image": "my image's.png", "seed": 3, "preserve-background": True})
    assert shlex.split(command)[2:] == ["--image", "my image's.png", "--seed", "3", "--preserve-background"]
    assert repeat_command({"guidance-interval": (0.2, 0.75)}).endswith("--guidance-interval 0.2 0.75")
    command = repeat_command({"image": "-x.png", "out": "~"})
    assert shlex.split(command)[2:] == ["--image=-x.png", "--out", "~"]
