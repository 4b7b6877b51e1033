"""Going on inside an epoch: exactly the next sample, whatever the workers, ranks and batch sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pbe.data.datamodule import CounterSampler, CountingLoader
from pbe.data.dataset import ExemplarDataset
from tests.data.test_datamodule import make_module


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_the_rest_of_an_epoch_after_a_stop_at_any_sample(shards, workers, ranks):
    """Nineteen samples were consumed by a run of another batch size and other workers."""
    whole = [make_module(shards).dataset("train")[index] for index in range(19, 43)]
    batch = 12 // ranks
    parts = []
    for rank in range(ranks):
        module = make_module(shards, batch_size=batch, num_workers=workers)
        sampler = CounterSampler(module.dataset("train"), batch, rank, ranks, drop_last=True)
        loader = CountingLoader(sampler, "train", 0.05, False, workers)
        loader.place = (0, 19)
        rows = iter(loader)
        parts.append([next(rows) for _ in range(2)])
        assert loader.place == (0, 43)
    together = [part[step] for step in range(2) for part in parts]
    images = torch.cat([part["image"] for part in together]).permute(0, 2, 3, 1).numpy()
    assert [index for part in together for index in part["sample_index"].tolist()] == list(range(19, 43))
    assert [key for part in together for key in part["key"]] == [item.key for item in whole]
    np.testing.assert_array_equal(images, np.stack([item.sample.image for item in whole]))


def test_the_tail_that_fills_no_batch_is_left_out(shards):
    module = make_module(shards, batch_size=16)
    module.load_state_dict({"epoch": 2, "samples": 50})
    loader = module.train_dataloader()
    assert next(iter(loader))["sample_index"].tolist() == list(range(180, 196))
    assert module.state_dict() == {"epoch": 3, "samples": 16}


def test_skipped_samples_are_not_decoded(shards, monkeypatch):
    module = make_module(shards, batch_size=10)
    made = []
    make = ExemplarDataset.__getitem__
    monkeypatch.setattr(ExemplarDataset, "__getitem__", lambda self, i: made.append(i) or make(self, i))
    module.load_state_dict({"epoch": 7, "samples": 50})
    next(iter(module.train_dataloader()))
    assert made == list(range(470, 480))
