"""The command that renders and packs scenes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pbe.data.samples.decode import decode_image
from pbe.data.shards.archive import ShardImages
from tests.commands import render as command


def render(folder, *options: str) -> bytes:
    arguments = ["--out", str(folder), "--scenes", "12", "--split", "test", "--seed", "4", *options]
    assert command.main(arguments) == 0
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.tar")))


def test_bytes_are_identical_on_rerun_and_with_workers(tmp_path, capsys):
    first = render(tmp_path / "a", "--workers", "0", "--scenes-per-shard", "5")
    assert "12 scenes in 3 shards" in capsys.readouterr().out
    assert render(tmp_path / "b", "--workers", "1", "--scenes-per-shard", "5") == first
    assert render(tmp_path / "a", "--workers", "0", "--scenes-per-shard", "5") == first


def test_scene_i_does_not_depend_on_the_number_of_scenes(tmp_path):
    render(tmp_path / "a", "--workers", "0")
    render(tmp_path / "b", "--workers", "0", "--scenes", "3")
    many, few = ShardImages(tmp_path / "a"), ShardImages(tmp_path / "b")
    assert (len(many), len(few)) == (12, 3)
    assert many.image(2) == few.image(2)


def test_shards_hold_readable_scenes_with_boxes(tmp_path):
    render(tmp_path, "--workers", "0", "--size", "64")
    pictures = ShardImages(tmp_path)
    assert pictures[0].key == "test-0000000"
    for position in range(len(pictures)):
        annotation = pictures.annotation(position)
        image = decode_image(pictures.image(position))
        assert image.shape == (annotation["height"], annotation["width"], 3)
        assert min(image.shape[:2]) == 64
        for box in annotation["boxes"]:
            x1, y1, x2, y2 = box["xyxy"]
            assert 0 <= x1 < x2 <= annotation["width"]
            assert 0 <= y1 < y2 <= annotation["height"]
            assert box["label"]
    assert json.dumps(annotation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "validation"], '"validation" for --split. Choose from: "train", "test"'),
        (["--scenes", "0"], "at least 1"),
        (["--size", "5"], "for --size. It must lie between 32 and 1024"),
        (["--max-long-side", "20"], "--max-long-side"),
        (["--max-long-side", "0"], "--max-long-side"),
        (["--max-objects", "9"], "--max-objects"),
        (["--recolour", "2"], "--recolour"),
        (["--recolour", "0.5", "--split", "test"], "--recolour is for the training split only"),
        (["--workers", "-1"], "--workers"),
        (["--world", "nowhere.zip"], "no toy world at 'nowhere.zip'"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, capsys, options, message):
    assert command.main(["--out", str(tmp_path), "--scenes", "1", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_packed_shards_of_others_are_left_alone(tmp_path, capsys):
    (tmp_path / "shards.json").write_text("{}")
    (tmp_path / "shard-000000.tar").write_bytes(b"packed")
    assert command.main(["--out", str(tmp_path), "--scenes", "1", "--workers", "0"]) == 2
    assert "pbe prepare has packed; name another folder" in capsys.readouterr().err
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"packed"


def test_runs_as_a_module(tmp_path, project_root):
    command = [sys.executable, "-m", "pbe.cli", "toy", "render", "--out", str(tmp_path), "--scenes", "x"]
    done = subprocess.run(
        command,
        cwd=project_root,
        env={"PYTHONPATH": str(project_root), "NO_ALBUMENTATIONS_UPDATE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--scenes" in done.stderr
