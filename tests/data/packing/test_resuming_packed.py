"""Order and resuming on shards that ``pbe prepare`` wrote, against a run without a stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pbe.data.datamodule import CounterSampler, CountingLoader
from tests.commands import prepare as prepare_data
from tests.data.packing.support import noise
from tests.data.test_datamodule import make_module

PICTURES, BOXES = 24, 48
BEFORE, AFTER, MORE = 4, 6, 4  # samples of all ranks together: before and after the stop; batches after it
STOPS = {"one": 12, "every": 36}  # samples; MORE batches of AFTER then lead into the next epoch

Sample = tuple[int, str, bytes]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four images with one to three boxes each, in four shards."""
    folder, out = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("packed") / "shards"
    lines = ["file,x1,y1,x2,y2,label"]
    for number in range(PICTURES):
        noise(48 + number, 40, seed=number).save(folder / f"p{number}.jpg")
        lines += [
            f"p{number}.jpg,{4 + 6 * box},{5 + box},{30 + 4 * box},32,thing" for box in range(1 + number % 3)
        ]
    (folder / "boxes.csv").write_text("\n".join(lines))
    arguments = [f"csv:{folder / 'boxes.csv'}@{folder}", "--out", str(out), "--workers", "0"]
    assert prepare_data.main([*arguments, "--shard-images", "7", "--no-perceptual"]) == 0
    manifest = json.loads((out / "shards.json").read_text())
    assert [shard["pictures"] for shard in manifest["shards"]] == [7, 7, 7, 3]
    assert manifest["boxes"] == BOXES
    return out


def samples_of(batch: dict[str, Any]) -> Iterator[Sample]:
    """Yield the counter, key and all bytes of each sample of a batch."""
    pictures = zip(*(batch[name].numpy() for name in ("image", "mask", "exemplar", "valid")), strict=True)
    numbers = batch["sample_index"].tolist()
    for number, key, arrays in zip(numbers, batch["key"], pictures, strict=True):
        yield number, key, b"".join(array.tobytes() for array in arrays)


def load(
    shards: Path, boxes: str, workers: int, ranks: int, size: int, place: tuple[int, int], steps: int
) -> tuple[list[Sample], tuple[int, int]]:
    """Take ``steps`` global batches of ``size`` samples from a place on; return them and the next place."""
    parts, places = [], set()
    for rank in range(ranks):
        module = make_module(shards, boxes=boxes, verify=True, batch_size=size // ranks)
        sampler = CounterSampler(module.dataset("train"), size // ranks, rank, ranks, drop_last=True)
        loader = CountingLoader(sampler, "train", 0.0, False, workers)
        loader.place = place
        stream = (batch for _ in range(steps) for batch in loader)  # as many epochs as it takes
        parts.append([list(samples_of(batch)) for _, batch in zip(range(steps), stream, strict=False)])
        places.add(loader.place)
    assert len(places) == 1
    return [sample for step in range(steps) for part in parts for sample in part[step]], places.pop()


@pytest.fixture(scope="module")
def straight(packed: Path) -> dict[str, list[Sample]]:
    """The first samples of a run in one process that is never stopped."""
    runs = {boxes: load(packed, boxes, 0, 1, 12, (0, 0), 6)[0] for boxes in STOPS}
    assert len({key for _, key, _ in runs["one"][:PICTURES]}) == PICTURES
    assert len({pixels for _, _, pixels in runs["every"]}) == 72
    return runs


RUNS = [(workers, ranks) for workers in (0, 1, 2, 3) for ranks in (1, 2)]


@pytest.mark.parametrize("boxes", ["one", "every"])
@pytest.mark.parametrize(("before", "after"), list(zip(RUNS, RUNS[3:] + RUNS[:3], strict=True)))
def test_stopped_and_resumed_with_other_workers_ranks_and_batches(packed, straight, boxes, before, after):
    """Every number of workers and ranks comes before a stop once, and after one once."""
    assert before[0] != after[0]
    assert before[1] != after[1]
    stop = STOPS[boxes]
    first, place = load(packed, boxes, *before, BEFORE, (0, 0), stop // BEFORE)
    assert place == (0, stop)
    rest, _ = load(packed, boxes, *after, AFTER, place, MORE)
    assert [number for number, _, _ in first + rest] == list(range(stop + AFTER * MORE))
    assert first + rest == straight[boxes][: stop + AFTER * MORE]


def test_no_sample_is_lost_or_doubled_in_an_epoch_of_boxes(packed, straight):
    """Forty-eight boxes: as many of each image as it has, and no two samples the same."""
    keys = [key for _, key, _ in straight["every"][:BOXES]]
    assert sorted(keys.count(key) for key in set(keys)) == [1] * 8 + [2] * 8 + [3] * 8
