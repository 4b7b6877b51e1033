"""The benchmarks of packing at a small size: what they make and compare, not how fast it is."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from pbe.data.sources.tables import read_open_images
from scripts import benchmark
from scripts.benchmarks.packing import (
    BOXES_NAME,
    differences,
    kill_and_resume,
    measure_annotations,
    synthetic_open_images,
    synthetic_source,
)
from tests.commands import prepare as prepare_data


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
    assert benchmark.main(["annotations", *small, "--json", str(out)]) == 0
    numbers = json.loads(out.read_text())
    assert numbers["boxes_seen"] == 900
    assert 0 < numbers["boxes"] < 900
    assert 30 < numbers["peak_mib"] < 2000
    assert numbers["whole"] >= numbers["plan"] + numbers["read annotations"]
    assert "peak memory" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json"]  # nothing is left behind


def test_the_peak_is_that_of_the_process_alone(tmp_path: Path) -> None:
    synthetic_open_images(tmp_path / "oi", 20, 60)
    ours = bytearray(2**30)
    ours[::4096] = b"x" * len(ours[::4096])
    assert measure_annotations(tmp_path / "oi", tmp_path / "plan")["peak_mib"] < 700


SMALL = ["--images", "40", "--width", "96", "--height", "64", "--shard-images", "4", "--workers", "0"]


def test_packing_and_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    arguments = ["packing", *SMALL, "--kills", "1", "--folder", str(tmp_path), "--json", str(out)]
    assert benchmark.main(arguments) == 0
    numbers = json.loads(out.read_text())
    assert numbers["pictures"] == 40
    assert numbers["copying"] > numbers["packing"] > 0
    assert numbers["cpu"] > numbers["stages"]["header"] / 40
    assert 0 < numbers["work"] < 60
    assert {"read", "hash and write", "decode and perceptual hash"} <= set(numbers["stages"])
    assert len(numbers["kills"]["shards_left"]) == 1
    assert numbers["kills"]["faults"] == []
    assert "every image once" in capsys.readouterr().out


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return synthetic_source(tmp_path, 70, 48, 32, 90)


def pack_to(source: Path, out: Path, *options: str) -> Path:
    name = f"csv:{source}@{source.parent / 'pictures'}"
    assert (
        prepare_data.main([name, "--out", str(out), "--workers", "0", "--shard-images", "20", *options]) == 0
    )
    return out


def test_images_have_bytes_of_their_own(source: Path, tmp_path: Path) -> None:
    files = [path.read_bytes() for path in (tmp_path / "pictures").iterdir()]
    assert len(set(files)) == 70
    report = json.loads((pack_to(source, tmp_path / "out") / "report.json").read_bytes())
    assert report["pictures"] == {"seen": 70, "kept": 70, "dropped": {}}
    assert report["boxes"]["kept"] == 140
    assert report["duplicates"]["exact"] == 0


def test_differences_are_found(source: Path, tmp_path: Path) -> None:
    straight = pack_to(source, tmp_path / "straight")
    assert differences(pack_to(source, tmp_path / "same"), straight, 70) == []
    changed = pack_to(source, tmp_path / "changed")
    path = changed / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    (changed / "shard-000002.index.npz").rename(changed / "other.npz")
    (changed / "shard-000002.tar").unlink()
    (changed / "shard-000002.index.npz").write_bytes((changed / "other.npz").read_bytes())
    found = differences(changed, straight, 71)
    assert found == [
        "shard-000002.tar is missing",
        "other.npz is too many",
        "shard-000001.tar has other bytes",
        "70 images of 70 names instead of 71",
    ]
    fewer = differences(pack_to(source, tmp_path / "fewer", "--max-area", "0.4"), straight, 70)
    assert "the report counts otherwise" in fewer
    (changed / "shards.json").unlink()
    assert differences(changed, straight, 70)[-1] == "there is no shards.json"


def test_a_packing_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(benchmark.UserError, match="status"):
        kill_and_resume(lambda out: ["false"], tmp_path / "straight", 1, 1, 0.1)


@pytest.mark.parametrize(
    "arguments",
    [["packing", "--images", "0"], ["packing", "--kills", "-1"], ["annotations", "--rows", "0"]],
)
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
