"""The machinery that measures training: what it measures, not how fast it is."""

from __future__ import annotations

import gc

import pytest
import torch

from pbe.errors import UserError
from scripts import benchmark
from scripts.benchmarks import training as timing
from scripts.benchmarks.training import (
    Speed,
    StepClock,
    compare_cache,
    compare_processes,
    measure_step,
    median,
)
from tests.training.tiny import tiny_config


class StubData:
    waited = 0.0


class StubTrainer:
    global_step = 0


def test_the_clock_notes_steps_not_micro_batches():
    data, trainer = StubData(), StubTrainer()
    clock = StepClock(data)
    for batch in range(1, 7):
        data.waited += 1.0
        trainer.global_step = batch // 2
        clock.on_train_batch_end(trainer)
    assert clock.waits == [2.0, 4.0, 6.0]
    assert clock.ends == sorted(clock.ends)


def test_the_median_of_rounds_is_that_of_each_number():
    rounds = [Speed(1.0, 0.5, 3.0), Speed(2.0, 0.1, 2.0), Speed(9.0, 0.2, 1.0)]
    assert median(rounds) == Speed(2.0, 0.2, 2.0)


def test_online_and_cached_take_turns(shards, autoencoder, tmp_path, monkeypatch):
    order = []
    original = timing.time_steps
    monkeypatch.setattr(
        timing, "time_steps", lambda *args, cached: order.append(cached) or original(*args, cached=cached)
    )
    config = tiny_config(shards, tmp_path, autoencoder, f"cache.folder={tmp_path / 'cache'}")
    found = compare_cache(config, 1, 2, 2)
    assert order == [False, True, False, True]
    assert [len(rounds) for rounds in found.values()] == [2, 2]
    for speed in (*found["online"], *found["cached"]):
        assert speed.samples_per_second > 0
        assert 0 <= speed.wait_share <= 1
        assert speed.step_seconds > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"], "a measurement leaves no run"


def test_a_measurement_keeps_no_optimizer_alive(shards, autoencoder, tmp_path):
    """The moments of the paper's optimizer are 7 GB: two rounds of them would not fit where one does."""
    config = tiny_config(shards, tmp_path, autoencoder)
    model, config = timing.random_or_built(config)
    before = {id(each) for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)}
    timing.time_steps(config, model, 1, 1, cached=False)
    alive = [each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)]
    assert not [each for each in alive if id(each) not in before]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_of_random_weights(shards, tmp_path):
    config = tiny_config(
        shards, tmp_path, "trainer.precision=bf16-mixed", "trainer.gradient_checkpointing=true"
    )
    step = measure_step(config, 1)
    assert step["trained"] > 100_000
    assert step["step_seconds"] > 0
    assert step["peak_gib"] > 0.1


def test_what_cannot_be_measured_is_one_line(shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path)
    with pytest.raises(UserError, match="at least 1"):
        compare_cache(config, 0, 2, 1)
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda _: {0}, raising=False)
    with pytest.raises(UserError, match="need two cores"):
        compare_processes(config, 2, tmp_path)


def test_the_command_prints_a_table(tmp_path, capsys):
    threads = torch.get_num_threads()
    small = ["--images=8", "--batch-size=2", "--steps=1", "--warm-up=1", "--rounds=1", "--workers=0"]
    try:
        assert benchmark.main(["train", *small, "--threads=1", "--json", str(tmp_path / "n.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["online", "cached"]
    assert (tmp_path / "n.json").is_file()
