"""The Python examples of the documentation run; those of docs/pipeline.md in order, as one program."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.config import ScheduleConfig
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import SOLVERS, get_solver
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
    Image.open(tmp_path / "exemplar.png").save(tmp_path / "exemplar.jpg")
    (tmp_path / "data").symlink_to(project_root / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_examples(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md", "docs/checkpoints.md"])
def test_examples_run_as_they_stand(page: str, workplace: Path, project_root: Path):
    (example,) = python_examples(project_root / page)
    exec(compile(example, page, "exec"), {})
    assert (workplace / "edit.png").is_file() or (workplace / "outputs/copy/config.json").is_file()


def test_the_solver_of_the_page_on_the_code_is_eulers(project_root: Path, monkeypatch: pytest.MonkeyPatch):
    (example,) = python_examples(project_root / "docs/how_it_works.md")
    monkeypatch.setitem(SOLVERS, "my_euler", SOLVERS["euler"])  # which takes it out again afterwards
    exec(compile(example, "docs/how_it_works.md", "exec"), {})
    schedule, start = make_schedule(ScheduleConfig()), torch.randn(1, 2, 4, 4)
    ends = [
        get_solver(name)(lambda x, timesteps: 0.3 * x.tanh(), start, schedule, 7)
        for name in ("my_euler", "euler")
    ]
    torch.testing.assert_close(*ends)


def test_the_examples_run(workplace: Path, project_root: Path, capsys: pytest.CaptureFixture[str]):
    examples = python_examples(project_root / "docs/pipeline.md")
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
