"""The measurement of scoring runs on what it makes, and measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from scripts.benchmarks import scoring


def test_edits_fit_their_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "DISTINCT", 2)
    cases, edits = scoring.synthetic_edits(tmp_path, 3, 32)
    folder = BenchmarkFolder(cases)
    assert len(folder) == 3
    assert np.array_equal(folder[0].image, folder[2].image)
    assert not np.array_equal(folder[0].image, folder[1].image)
    seconds, ran = scoring.measure_scoring(cases, edits)
    assert {"copy-paste", "seam", "toy-similarity", "psnr-outside"} <= set(ran)
    assert 0.0 < seconds["reading alone"] < seconds["scoring"]


def test_the_command_prints_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    assert scoring.main(["--count", "2", "--size", "32", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 edits of 32 px " in printed
    assert "scores: psnr-outside" in printed
    ((title, rows),) = json.loads(out.read_text())["tables"].items()
    assert "toy-similarity" in title
    assert list(rows) == ["reading alone", "scoring"]


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--size", "0"]])
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert scoring.main(arguments) == 2
    assert capsys.readouterr().err == "error: --count must be at least 1, --size at least 8\n"
