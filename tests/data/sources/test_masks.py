"""Masks of objects: files of every kind, polygons and codes that are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pbe.data.sources.annotations import DroppedError
from pbe.data.sources.masks import load_mask, mask_box, read_mask_folder
from pbe.errors import UserError

Save = Callable[..., Path]
DRAWN = np.zeros((30, 40), np.uint8)
DRAWN[4:10, 8:20] = 1
NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def test_files_are_read_as_editing_reads_them(tmp_path: Path) -> None:
    both = np.dstack([np.repeat(DRAWN[:, :, None] * 255, 3, axis=2), np.full_like(DRAWN, 255)])
    both[0, 0, 3] = 0
    kinds = {
        "": DRAWN * 255,
        "alpha": np.dstack([NOISE, DRAWN * 255]),
        "luminance times alpha": both,
        "the values 0 and 1": DRAWN.astype(np.uint16),
        "one colour on black": DRAWN[:, :, None] * np.array([255, 0, 0], np.uint8),
    }
    for decided, values in kinds.items():
        Image.fromarray(values).save(tmp_path / "a.png")
        mask, read_by = load_mask(f"file:{tmp_path / 'a.png'}", 40, 30)
        assert read_by == decided
        assert (mask == DRAWN).all()


def test_classes_are_counted_under_one_reason(tmp_path: Path) -> None:
    for brightest in (5, 9):
        Image.fromarray(DRAWN * brightest).save(tmp_path / "a.png")
        with pytest.raises(DroppedError, match=r"^mask is not black and white$"):
            load_mask(f"file:{tmp_path / 'a.png'}", 40, 30)


def test_reasons_read_well(tmp_path: Path) -> None:
    Image.fromarray(DRAWN.astype(np.int32) - 1).save(tmp_path / "a.tif")
    with pytest.raises(DroppedError, match=r"^mask: its grey values lie outside 0 to 65535$"):
        load_mask(f"file:{tmp_path / 'a.tif'}", 40, 30)


@pytest.mark.parametrize(
    "shape",
    [
        [[8, 4, 20, 4, 20, 10, 8, 10]],
        [8, 4, 20, 4, 20, 10, 8, 10],
        [["8", 4.0, "20.0", 4, 20, "1e1", 8, 10]],
    ],
)
def test_polygons(shape: list[Any]) -> None:
    assert (load_mask(json.dumps(shape), 40, 30)[0] == DRAWN).all()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([[8, 4, 20]], "unreadable"),
        ([[8, 4, 20, float("nan"), 20, 10]], "unreadable"),
        ([[8, 4, 1e30, 4, 20, 10]], "unreadable"),
        ([[8, 4, 10**400, 4, 20, 10]], "unreadable"),
        ([[8, 4, None, 4, 20, 10]], "unreadable"),
        ([["x"] * 6], "unreadable"),
        (5, "unreadable"),
        ("text", "unreadable"),
        ({"size": [30]}, "another size"),
        ({"counts": [1]}, "unreadable"),
        ({"size": [40, 30], "counts": [1200]}, "another size"),
        ({"size": [2**40, 2**40], "counts": [2**80]}, "another size"),
        ({"size": [30, 40], "counts": [float("inf")]}, "unreadable"),
        ({"size": [30, 40], "counts": "o" * 10_000}, "unreadable"),
    ],
)
def test_damaged_shapes(shape: Any, words: str) -> None:
    with pytest.raises(DroppedError, match=words):
        load_mask(json.dumps(shape), 40, 30)


def test_owners_of_masks(tmp_path: Path, save: Save) -> None:
    for name in ("images/a.jpg", "images/ä.jpg", "images/B.JPG", "images/._a.jpg"):
        save(name, format="JPEG")
    (tmp_path / "masks").mkdir()
    for name in ("a.png", "a\u0308_1.png", "b.png", "c.png", "._a.png", "Thumbs.db"):
        Image.fromarray(DRAWN * 255).save(tmp_path / "masks" / name, format="PNG")
    found = read_mask_folder(tmp_path)
    assert {record.name: len(record.boxes) for record in found.records()} == {
        "a.jpg": 1,
        "ä.jpg": 1,
        "B.JPG": 1,
    }
    assert found.dropped_boxes == {"mask without an image": 1}
    assert "masks/c.png' (1 in all) belongs to no image" in found.notes[0]
    text = next(found.records()).boxes[0].mask
    assert mask_box(load_mask(text, 40, 30)[0]) == (8, 4, 20, 10)
    for path in (tmp_path / "images").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(UserError, match="no mask has an image"):
        read_mask_folder(tmp_path)
