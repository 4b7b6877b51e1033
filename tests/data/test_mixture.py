"""Two data sets in one stream: the share, the counters and the length of an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pbe.config import Config, DataConfig
from pbe.data.datamodule import TrainingData
from pbe.data.dataset import DatasetItem
from pbe.data.mixture import Mixture
from pbe.data.shards.archive import ShardRecord, write_shards


class Numbers:
    """Stands for a data set: every sample tells its counter."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> DatasetItem:
        return DatasetItem(index, f"{self.name} {index}", None, Counter())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 0.99])
def test_shares_are_even_and_no_sample_is_passed_over(share: float):
    mixture = Mixture(Numbers("own", 4), Numbers("prior", 10), share)
    keys = [mixture[index].key for index in range(1000)]
    taken = Counter(key.split()[0] for key in keys)
    assert taken["prior"] == int(1000 * share + 1e-6)
    for name in taken:  # each in its own order, from its first sample on
        assert [key for key in keys if key.startswith(name)] == [f"{name} {n}" for n in range(taken[name])]
    for start in range(0, 1000, 100):
        within = sum(key.startswith("prior") for key in keys[start : start + 100])
        assert abs(within - 100 * share) <= 1


def test_a_sample_keeps_the_streams_counter():
    mixture = Mixture(Numbers("own", 4), Numbers("prior", 10), 0.5)
    assert [mixture[index].index for index in (0, 7, 10**9)] == [0, 7, 10**9]


@pytest.mark.parametrize(
    ("own", "prior", "share", "length"), [(5, 1000, 0.5, 2000), (500, 10, 0.5, 1000), (7, 9, 0, 7)]
)
def test_an_epoch_goes_through_the_slower_one(own: int, prior: int, share: float, length: int):
    assert len(Mixture(Numbers("own", own), Numbers("prior", prior), share)) == length


def test_training_data_mix_two_folders(make_shards):
    config = DataConfig(
        train_shards=make_shards("own"), prior_shards=make_shards("prior"), prior_share=0.25,
        image_size=32, exemplar_size=24, batch_size=8, num_workers=0,
    )  # fmt: skip
    loader = TrainingData(Config(data=config)).train_dataloader()
    batch = next(iter(loader))
    assert sum(key.startswith("prior") for key in batch["key"]) == 2
    assert batch["sample_index"].tolist() == list(range(8))
    again = next(iter(TrainingData(Config(data=config)).train_dataloader()))
    assert torch.equal(batch["image"], again["image"])


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[[str], str]:
    """Write shards of images whose keys say which ones they are."""

    def write(name: str) -> str:
        noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
        encoded = cv2.imencode(".png", noise)[1].tobytes()
        records = (ShardRecord(f"{name}-{n}", encoded, "png", 40, 40, [(8, 8, 32, 32)]) for n in range(9))
        write_shards(records, tmp_path / name)
        return str(tmp_path / name)

    return write
