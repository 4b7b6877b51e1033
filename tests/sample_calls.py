"""What the tests of ``sample.py`` share: a model, images, and a call with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.checkpoints.native import save_model
from pbe.cli.main import main as pbe
from tests.editing.tiny_model import make_tiny_model


def main(call: list[str]) -> int:
    """Run ``pbe edit`` as sample.py does."""
    return pbe(["edit", *call])


def write_model(folder: Path) -> Path:
    save_model(folder, make_tiny_model())
    return folder


def write_files(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, size in (("a", (30, 40)), ("b", (48, 20))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(rng.integers(0, 256, (25, 20, 3), np.uint8)).save(folder / "e.jpg")
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:30] = 255
    Image.fromarray(mask).save(folder / "m.png")
    return folder


def arguments(model: Path, files: Path, *more: str) -> list[str]:
    inputs = ["--image", f"{files}/a.png", "--mask", f"{files}/m.png", "--exemplar", f"{files}/e.jpg"]
    return ["--model", str(model), "--out", f"{files}/out", "--steps", "4", *inputs, *more]


def written(files: Path) -> list[str]:
    return sorted(path.name for path in (files / "out").iterdir())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def complaint(capsys: pytest.CaptureFixture[str], call: list[str]) -> str:
    assert main(call) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err
