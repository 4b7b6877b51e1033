"""Whole optimizer steps in every epoch, repeatable few batches, and workers that signals do not reach."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from pbe.data.datamodule import CounterSampler
from tests.data.test_datamodule import make_module


def counters(sampler: CounterSampler, epoch: int = 0, first: int = 0) -> list[int]:
    sampler.seek(epoch, first * sampler.global_batch)
    return list(sampler)


@pytest.mark.parametrize(
    ("length", "batch", "accumulate", "batches"), [(8, 1, 3, 6), (8, 2, 2, 4), (9, 2, 2, 4), (11, 3, 1, 3)]
)
def test_an_epoch_is_made_of_whole_steps(length: int, batch: int, accumulate: int, batches: int):
    sampler = CounterSampler(range(length), batch, 0, 1, True, accumulate, 0)
    assert sampler.batches == batches
    assert counters(sampler) == list(range(batches * batch))
    assert counters(sampler, 1) == [length + i for i in range(batches * batch)]
    assert counters(sampler, 0, batches - 1) == list(range((batches - 1) * batch, batches * batch))


def test_an_epoch_shorter_than_a_step_is_one_short_step():
    sampler = CounterSampler(range(5), 2, 0, 1, True, 4, 0)
    assert (sampler.batches, counters(sampler)) == (3, [0, 1, 2, 3, 4])


def test_ranks_and_micro_batches_share_the_same_global_steps():
    whole = CounterSampler(range(20), 8, 0, 1, True, 1, 0)
    ranks = [CounterSampler(range(20), 2, rank, 2, True, 2, 0) for rank in range(2)]
    first, second = (counters(rank) for rank in ranks)
    assert sorted(first + second) == counters(whole)
    for step in range(2):
        mine = slice(4 * step, 4 * step + 4)
        assert sorted(first[mine] + second[mine]) == list(range(8 * step, 8 * step + 8))


def test_overfitting_repeats_the_same_samples():
    sampler = CounterSampler(range(20), 4, 0, 1, True, 1, 2)
    assert sampler.batches == 2
    assert counters(sampler, 0) == counters(sampler, 7) == list(range(8))


def test_the_loader_knows_how_long_it_was_waited_for(shards: Path):
    data = make_module(shards, batch_size=15)
    assert data.waited == 0.0
    start = time.perf_counter()
    assert len(list(data.train_dataloader())) == 4
    assert 0.0 < data.waited < time.perf_counter() - start


def test_workers_leave_signals_to_the_main_process(shards: Path):
    data = make_module(shards, num_workers=1, batch_size=1)
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    # from a process that is not the worker's parent, as a signal to the whole group is
    for name in ("-INT", "-TERM", "-TERM"):
        subprocess.run(["kill", name, str(worker.pid)], check=True)
    assert len(list(batches)) == 59
    assert worker.is_alive()
    worker.terminate()  # but the parent is obeyed
    worker.join(timeout=60)
    assert not worker.is_alive()
    data.close()
