"""The command that measures solvers: a small run on the model that ships, and its complaints."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from scripts.benchmarks.solver_runs import CANDIDATES
from scripts.benchmarks.solvers import BEGIN, END, main

KEPT = ["preset draft", "normal, guidance in 0.2 to 1", "normal, inner levels kept for 2"]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "solvers.md"
    path.write_text(f"before {{}}\n{BEGIN}\nold\n{END}\nafter\n")
    return path


def test_a_small_run(project_root: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = page.parent / "images" / "plot.png"
    model = project_root / "data" / "toy" / "model"
    sizes = ["--cases", "1", "--calls", "2", "4", "--reference", "5", "--scored", "2"]
    sizes += ["--json", str(page.parent / "numbers.json"), "--settings", *KEPT]
    assert main(["--model", str(model), "--page", str(page), "--plot", str(plot), *sizes]) == 0
    assert str(plot) in capsys.readouterr().out
    with Image.open(plot) as picture:
        assert picture.width > 800
    text = page.read_text()
    assert text.startswith(f"before {{}}\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "--calls 2 4 --reference 5" in text
    assert ": 1 edits" in text
    for name in KEPT:
        assert text.count(f"| {name} |") == 1
    for candidate in CANDIDATES:
        rows = [line for line in text.splitlines() if line.startswith(f"| {candidate.label} |")]
        assert len(rows) == 2
        numbers = [float(cell) for row in rows for cell in row.split("|")[2:-1]]
        assert len(numbers) == 4
        assert all(number > 0.0 for number in numbers)


def test_a_page_without_its_place(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.write_text("nothing")
    assert main(["--page", str(page)]) == 2
    assert "lacks the lines" in capsys.readouterr().err
    assert main(["--page", str(page.parent / "none.md")]) == 2
    assert "there is no page" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--cases", "0"], ["--calls", "1", "5"]])
def test_nothing_to_measure(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    assert "--cases and --scored must be at least 1, --calls at least 2" in capsys.readouterr().err
