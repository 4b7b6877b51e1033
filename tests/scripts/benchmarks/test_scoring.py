"""The measurement of scoring runs on what it makes, and measures what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from scripts import benchmark
from scripts.benchmarks import scoring as timing


def test_edits_fit_their_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "DISTINCT", 2)
    cases, edits = timing.synthetic_edits(tmp_path, 3, 32)
    folder = BenchmarkFolder(cases)
    assert len(folder) == 3
    assert np.array_equal(folder[0].image, folder[2].image)
    assert not np.array_equal(folder[0].image, folder[1].image)
    found = timing.measure_scoring(cases, edits)
    assert found.cases == 3
    assert {"copy-paste", "seam", "toy-similarity", "psnr-outside"} <= set(found.ran)
    assert 0.0 < found.read < found.score


def test_the_command_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["scoring", "--count", "2", "--size", "32"]) == 0
    assert "2 edits of 32 px " in capsys.readouterr().out
