"""The benchmark of planning at a small size: what it makes and counts, not how fast it is."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from pbe.data.sources.tables import read_open_images
from scripts.benchmarks import annotations
from scripts.benchmarks.annotations import BOXES_NAME, measure_annotations, synthetic_open_images


def test_synthetic_open_images_is_one(tmp_path: Path) -> None:
    synthetic_open_images(tmp_path / "oi", 400, 3000)
    table = pl.read_csv(tmp_path / "oi" / BOXES_NAME)
    assert (table.height, table.width) == (3000, 21)
    assert table["XMin"].is_between(0, 1).all()
    assert (table["XMax"] >= table["XMin"]).all()
    assert table.columns[:5] == ["ImageID", "Source", "LabelName", "Confidence", "XMin"]
    found = read_open_images(tmp_path / "oi")
    assert found.images.height == 400
    assert found.images["bytes"].unique().to_list() == [295_000]
    assert found.images["licence"].null_count() == 0
    assert 0 < found.dropped_images.total() < 60
    assert found.boxes.height + found.dropped_boxes.total() == 3000


def test_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    small = ["--rows", "900", "--images", "100", "--folder", str(tmp_path)]
    assert annotations.main([*small, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["tables"]["annotations of Open Images"]
    assert rows["boxes in the CSV"] == {"count": 900}
    assert 0 < rows["boxes planned"]["count"] < 900
    assert 0 < rows["images planned"]["count"] <= 100
    assert rows["shards"] == {"count": 1}
    assert 30 < rows["peak memory"]["MiB"] < 2000
    stages = rows["plan"]["seconds"] + rows["read annotations"]["seconds"]
    assert rows["whole"]["seconds"] >= stages
    assert rows["cpu"]["seconds"] > 0
    assert "peak memory" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json"]  # nothing is left behind


def test_the_peak_is_that_of_the_process_alone(tmp_path: Path) -> None:
    synthetic_open_images(tmp_path / "oi", 20, 60)
    ours = bytearray(2**30)
    ours[::4096] = b"x" * len(ours[::4096])
    assert measure_annotations(tmp_path / "oi", tmp_path / "plan")["peak_mib"] < 700


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--images", "0"], ["--folder", "nowhere"]])
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert annotations.main(arguments) == 2
    error = capsys.readouterr().err
    assert arguments[0] in error
    assert error.count("\n") == 1
