"""The benchmark's machinery at a small size: what it measures, not how fast it is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pbe.data.samples import sample as sample_module
from pbe.data.shards.archive import ShardImages
from scripts import benchmark
from scripts.benchmarks import loading as timing
from scripts.benchmarks.loading import REST, STAGES, measure_opening, synthetic_index, synthetic_shards

SMALL = ["--images", "4", "--width", "96", "--height", "64", "--size", "32", "--exemplar-size", "24"]


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
    loader = numbers["loaders"]["0"]
    assert loader["rate"] > 0
    assert loader["workers"] == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_the_cpu_time_of_processes():
    """The kernel's ticks are hundredths of seconds."""
    me = os.getpid()
    assert timing._cpu_seconds([me]) == pytest.approx(time.process_time(), abs=0.1)
    assert timing._cpu_seconds([me, me]) == pytest.approx(2 * time.process_time(), abs=0.2)
    assert timing._cpu_seconds([]) == 0


def test_a_large_index_opens(tmp_path):
    tar = synthetic_shards(tmp_path / "small", 3, 96, 64, 90)[0]
    pictures = ShardImages(synthetic_index(tmp_path / "index", tar, 5500, 41_111), count_boxes=True)
    assert (len(pictures), pictures.box_count) == (5500, 41_111)
    owners = [pictures.owner(box) for box in (0, 1, 20_000, 41_110)]
    assert owners[0] == (0, 0)
    assert owners[-1][0] == 5499
    assert pictures.image(2001) == ShardImages(tar).image(1)
    assert pictures.row(5000).frame == (96, 64)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_opening_tells_torch_s_memory_from_the_rest(tmp_path, monkeypatch, capsys):
    """What importing takes is measured once, in a process of its own; here only who says what."""
    mib = {place: {"resident": 500.0 + n, "private": 300.0 + n} for n, place in enumerate(
        ("torch", "imports", "opened", "first batch"))}  # fmt: skip
    row = {"samples": 5500, "open_s": 0.011, "first_batch_s": 0.17, "mib": mib}
    asked = []
    monkeypatch.setattr(benchmark, "measure_opening", lambda folder, **options: asked.append(options) or row)
    arguments = ["data", *SMALL, "--seconds", "0", "--workers", "--open", "5500", "41111"]
    assert benchmark.main(arguments) == 0
    assert asked == [{"boxes": "one", "workers": 2}, {"boxes": "every", "workers": 2}]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "MiB resident: torch 500 500" in lines
    assert "MiB of it private: first batch 303 303" in lines


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_an_index_opens_in_a_process_of_its_own(tmp_path):
    tar = synthetic_shards(tmp_path / "small", 3, 96, 64, 90)[0]
    found = measure_opening(synthetic_index(tmp_path / "index", tar, 300, 900), boxes="every", workers=1)
    assert (found["pictures"], found["samples"]) == (300, 900)
    assert 0 < found["open_s"] < found["first_batch_s"]
    places = [found["mib"][place] for place in ("torch", "imports", "opened")]
    assert places[0]["resident"] < places[1]["resident"] <= places[2]["resident"] + 1
    assert all(0 < place["private"] < place["resident"] for place in places)


def test_mistakes_are_one_line(capsys):
    assert benchmark.main(["data", "--images", "0"]) == 2
    assert benchmark.main(["data", "--shards", "nowhere"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(error.startswith("error: ") for error in errors)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err
