"""Benchmarks whose exemplars are the hidden objects."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from pbe.errors import UserError
from pbe.evaluation.benchmark.cases import BenchmarkFolder
from pbe.evaluation.benchmark.own import write_own_exemplars


def test_cases_are_the_same_but_for_the_exemplars(bench_files: Path, tmp_path: Path) -> None:
    assert write_own_exemplars(bench_files, tmp_path / "own", 48) == 7
    before, after = BenchmarkFolder(bench_files), BenchmarkFolder(tmp_path / "own")
    assert before.ids == after.ids
    assert before.sha256 != after.sha256
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.mask, other.mask)
        x, y, width, height = cv2.boundingRect(one.mask)
        part = one.image[y : y + height, x : x + width]
        larger = cv2.resize(part, (48, 48), interpolation=cv2.INTER_LINEAR)
        assert other.exemplar.shape == (48, 48, 3)
        assert np.array_equal(other.exemplar, larger)


def test_a_folder_that_holds_something_is_left_alone(bench_files: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        write_own_exemplars(bench_files, tmp_path / "own", 48)
    assert [file.name for file in (tmp_path / "own").iterdir()] == ["mine.txt"]


def test_a_damaged_case_leaves_no_benchmark_behind(bench_files: Path, tmp_path: Path) -> None:
    shutil.copytree(bench_files, tmp_path / "bad")
    next(iter(sorted((tmp_path / "bad" / "GT_3500").iterdir()))).write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        write_own_exemplars(tmp_path / "bad", tmp_path / "own", 48)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
