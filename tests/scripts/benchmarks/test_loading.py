"""The benchmark's machinery at a small size: what it measures, not how fast it is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from pbe.config import Config, DataConfig
from pbe.data.datamodule import TrainingData
from pbe.data.samples import sample as sample_module
from pbe.data.shards.archive import ShardImages
from scripts.benchmarks import data, loading as timing
from scripts.benchmarks.loading import REST, STAGES, measure_opening, synthetic_index, synthetic_shards

SMALL = ["--images", "4", "--width", "96", "--height", "64", "--sizes", "32", "--exemplar-size", "24"]
SMALL += ["--seconds", "0", "--repeats", "1", "--no-inputs"]


def test_stages_add_up_and_everything_is_put_back(tmp_path, capsys):
    cut = sample_module.cut
    out = tmp_path / "numbers.json"
    assert data.main([*SMALL, "--workers", "0", "--json", str(out)]) == 0
    assert sample_module.cut is cut
    tables = json.loads(out.read_text())["tables"]
    stages = {name: row["32 px"] for name, row in tables["stages of a sample, CPU milliseconds"].items()}
    whole = stages.pop("whole sample")
    assert set(stages) == {name for name, _, _ in STAGES} | {REST, "bare decoding"}
    assert sum(stages.values()) - stages["bare decoding"] == pytest.approx(whole, rel=0.5)
    rates = tables["samples a second, 32 px"]
    assert list(rates) == ["ours, 0 workers", "plain, 0 workers"]
    quotient = rates["ours, 0 workers"]["a second"] / rates["plain, 0 workers"]["a second"]
    assert rates["ours, 0 workers"]["speed"] == pytest.approx(quotient)
    assert "ours, 0 workers" in capsys.readouterr().out
    assert (tmp_path / "numbers.png").stat().st_size > 1000


def test_the_plain_peer_hands_out_what_the_samples_here_are(tmp_path):
    """Shapes and types, and a mask that holds the box: else the comparison would be of other work."""
    shards = synthetic_shards(tmp_path / "shards", 4, 96, 64, 90)
    config = DataConfig(train_shards=str(shards[0]), image_size=32, exemplar_size=24, batch_size=4)
    config.num_workers = 0
    files = data.write_files(ShardImages(config.train_shards), config, 4, tmp_path / "files")
    assert len(list(files.glob("*.jpg"))) == 4
    plain = next(iter(timing.plain_loader(files, config)))
    ours = next(iter(TrainingData(Config(data=config)).train_dataloader()))
    for name in ("image", "mask", "exemplar"):
        assert plain[name].shape == ours[name].shape
        assert plain[name].dtype == ours[name].dtype == torch.uint8
    assert set(plain["mask"].unique().tolist()) == {0, 255}
    assert plain["image"].flatten(1).float().std(dim=1).min() > 5  # images, not one colour


def test_inputs_come_from_the_networks_and_from_the_cache(monkeypatch):
    monkeypatch.setattr(data, "SCENES", 4)
    monkeypatch.setattr(data, "TOY_BATCH", 4)
    rows = data.input_rows(1)
    names = list(rows)
    assert (names[0], names[-1]) == ("online", "from the cache")
    assert rows["online"]["of online"] == 1.0
    parts = [row["ms"] for name, row in rows.items() if name.startswith("of it")]
    assert len(parts) == 3
    assert all(0.0 < part < 2.0 * rows["online"]["ms"] for part in parts)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_the_cpu_time_of_processes():
    """The kernel's ticks are hundredths of seconds."""
    me = os.getpid()
    assert timing._cpu_seconds([me]) == pytest.approx(time.process_time(), abs=0.1)
    assert timing._cpu_seconds([me, me]) == pytest.approx(2 * time.process_time(), abs=0.2)
    assert timing._cpu_seconds([]) == 0


def test_a_large_index_opens(tmp_path):
    tar = synthetic_shards(tmp_path / "small", 3, 96, 64, 90)[0]
    images = ShardImages(synthetic_index(tmp_path / "index", tar, 5500, 41_111), count_boxes=True)
    assert (len(images), images.box_count) == (5500, 41_111)
    owners = [images.owner(box) for box in (0, 1, 20_000, 41_110)]
    assert owners[0] == (0, 0)
    assert owners[-1][0] == 5499
    assert images.image(2001) == ShardImages(tar).image(1)
    assert images.row(5000).frame == (96, 64)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_opening_tells_torch_s_memory_from_the_rest(tmp_path, monkeypatch, capsys):
    """What importing takes is measured once, in a process of its own; here only who says what."""
    mib = {place: {"resident": 500.0 + n, "private": 300.0 + n} for n, place in enumerate(
        ("torch", "imports", "opened", "first batch"))}  # fmt: skip
    row = {"samples": 5500, "open_s": 0.011, "first_batch_s": 0.17, "mib": mib}
    asked = []
    monkeypatch.setattr(data, "measure_opening", lambda folder, **options: asked.append(options) or row)
    out = str(tmp_path / "numbers.json")
    assert data.main([*SMALL, "--workers", "--open", "5500", "41111", "--json", out]) == 0
    assert asked == [{"boxes": "one", "workers": 2}, {"boxes": "every", "workers": 2}]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "MiB resident: torch 500 500" in lines
    assert "MiB of it private: first batch 303 303" in lines
    assert "samples a second" not in " ".join(lines)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_an_index_opens_in_a_process_of_its_own(tmp_path):
    tar = synthetic_shards(tmp_path / "small", 3, 96, 64, 90)[0]
    found = measure_opening(synthetic_index(tmp_path / "index", tar, 300, 900), boxes="every", workers=1)
    assert (found["images"], found["samples"]) == (300, 900)
    assert 0 < found["open_s"] < found["first_batch_s"]
    places = [found["mib"][place] for place in ("torch", "imports", "opened")]
    assert places[0]["resident"] < places[1]["resident"] <= places[2]["resident"] + 1
    assert all(0 < place["private"] < place["resident"] for place in places)


def test_mistakes_are_one_line(capsys):
    assert data.main(["--images", "0"]) == 2
    assert data.main(["--shards", "nowhere"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(error.startswith("error: ") for error in errors)
    with pytest.raises(SystemExit, match="2"):
        data.main(["--device", "cuda"])  # which would change nothing
    assert "unrecognized arguments: --device" in capsys.readouterr().err
