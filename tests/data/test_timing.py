"""The benchmark's machinery at a small size: what it measures, not how fast it is."""

from __future__ import annotations

import json

import pytest

from pbe.data import sample as sample_module
from pbe.data.shards import ShardPictures
from pbe.data.timing import REST, STAGES, synthetic_index, synthetic_shards
from scripts import benchmark

SMALL = ["--pictures", "4", "--width", "96", "--height", "64", "--size", "32", "--exemplar-size", "24"]


def test_stages_add_up_and_everything_is_put_back(tmp_path, capsys):
    cut = sample_module.cut
    out = tmp_path / "numbers.json"
    arguments = ["data", *SMALL, "--seconds", "0", "--workers", "0", "--json", str(out)]
    assert benchmark.main(arguments) == 0
    assert sample_module.cut is cut
    numbers = json.loads(out.read_text())
    stages = numbers["stages"]["stages"]
    assert set(stages) == {name for name, _, _ in STAGES} | {REST}
    assert sum(stages.values()) == pytest.approx(numbers["stages"]["whole"], rel=0.5)
    assert numbers["stages"]["ratio"] > 0
    printed = capsys.readouterr().out
    assert "whole sample" in printed
    assert "0 workers" in printed


def test_a_large_index_opens(tmp_path):
    tar = synthetic_shards(tmp_path / "small", 3, 96, 64, 90)[0]
    pictures = ShardPictures(synthetic_index(tmp_path / "index", tar, 5500, 41_111), count_boxes=True)
    assert (len(pictures), pictures.box_count) == (5500, 41_111)
    owners = [pictures.owner(box) for box in (0, 1, 20_000, 41_110)]
    assert owners[0] == (0, 0)
    assert owners[-1][0] == 5499
    assert pictures.picture(2001) == ShardPictures(tar).picture(1)
    assert pictures.row(5000).frame == (96, 64)


def test_mistakes_are_one_line(capsys):
    assert benchmark.main(["data", "--pictures", "0"]) == 2
    assert benchmark.main(["everything"]) == 2
    assert benchmark.main(["data", "--shards", "nowhere"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(error.startswith("error: ") for error in errors)
