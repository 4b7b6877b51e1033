"""The examples of docs/pipeline.md, run in order as one program."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.editing.pipeline import PaintByExample


@pytest.fixture
def workplace(tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the images and the model that the page speaks of."""
    rng = np.random.default_rng(0)
    for name, size in (("exemplar", (40, 50)), ("image", (64, 80))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros((64, 80), np.uint8)
    mask[20:50, 20:60] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "data").symlink_to(project_root / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_run(workplace: Path, project_root: Path, capsys: pytest.CaptureFixture[str]):
    page = (project_root / "docs/pipeline.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    offline = [each for each in examples if "# needs the network" not in each]
    assert len(examples) == len(offline) + 2
    names: dict[str, object] = {}
    for example in offline:
        exec(compile(example, "docs/pipeline.md", "exec"), names)
    assert Image.open(workplace / "edit.png").size == (80, 64)
    assert names["pixels"].shape == (1, 3, 64, 64)
    assert names["embeds"].shape[0] == 2
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["0", "5"]


@pytest.mark.parametrize("method", ["from_pretrained", "__call__"])
def test_the_page_tells_of_every_argument(project_root: Path, method: str):
    page = (project_root / "docs/pipeline.md").read_text()
    names = set(inspect.signature(getattr(PaintByExample, method)).parameters)
    names -= {"self", "pretrained_model_name_or_path", "others"}
    assert [each for each in sorted(names) if not re.search(rf"\b{each}\b", page)] == []
