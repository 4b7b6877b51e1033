"""The benchmark of packing at a small size: what it makes and compares, not how fast it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pbe.errors import UserError
from scripts.benchmarks import packing
from scripts.benchmarks.packing import (
    IMAGES_FOLDER,
    KillResult,
    differences,
    kill_and_resume,
    report_kills,
    synthetic_source,
)
from tests.commands import prepare as prepare_data

SMALL = ["--images", "40", "--width", "96", "--height", "64", "--shard-images", "4", "--workers", "0"]


def test_packing_and_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    arguments = [*SMALL, "--kills", "1", "--folder", str(tmp_path), "--json", str(out)]
    assert packing.main(arguments) == 0
    tables = json.loads(out.read_text())["tables"]
    rates = tables["40 images"]
    assert rates["copying and hashing alone"]["a second"] > rates["packing"]["a second"] > 0
    assert 0 < rates["packing"]["of copying"] < 1
    stages = tables["stages, wall time of all processes"]
    assert stages["CPU time of everything"]["ms an image"] > stages["header"]["ms an image"]
    assert 0 < stages["first file to last, wall time"]["seconds"] < 60
    assert {"read", "hash and write", "decode and perceptual hash"} <= set(stages)
    assert list(tables["whole shards that each kill left"]) == ["kill 1"]
    assert "every image once" in capsys.readouterr().out


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return synthetic_source(tmp_path, 70, 48, 32, 90)


def pack_to(source: Path, out: Path, *options: str) -> Path:
    name = f"csv:{source}@{source.parent / IMAGES_FOLDER}"
    assert (
        prepare_data.main([name, "--out", str(out), "--workers", "0", "--shard-images", "20", *options]) == 0
    )
    return out


def test_images_have_bytes_of_their_own(source: Path, tmp_path: Path) -> None:
    files = [path.read_bytes() for path in (tmp_path / IMAGES_FOLDER).iterdir()]
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
    with pytest.raises(UserError, match="status"):
        kill_and_resume(lambda out: ["false"], tmp_path / "straight", 1, 1, 0.1)


def test_a_difference_after_kills_ends_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="not what was packed at once: a; b") as ended:
        report_kills(KillResult([3, 7], ["a", "b"]))
    assert isinstance(ended.value.code, str)  # which Python prints, with status 1
    assert "2 kills, which left 3, 7 whole shards" in capsys.readouterr().out
    assert report_kills(KillResult([3, 7], [])) == {"kill 1": {"shards": 3}, "kill 2": {"shards": 7}}


@pytest.mark.parametrize("arguments", [["--images", "0"], ["--kills", "-1"], ["--folder", "nowhere"]])
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert packing.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
