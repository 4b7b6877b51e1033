"""The benchmark of training as a run does it: what it measures, not how fast it is."""

from __future__ import annotations

import gc
import json

import pytest
import torch

from pbe.errors import UserError
from scripts.benchmarks import cache, common
from scripts.benchmarks.cache import (
    StepClock,
    compare_cache,
    compare_processes,
    measure_step,
    speed_rows,
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


def test_the_table_has_medians_ratios_of_one_turn_and_the_single_rounds():
    columns = "a second", "waiting %", "a step, s"
    numbers = {
        "online": [(1.0, 50.0, 3.0), (2.0, 10.0, 2.0), (4.0, 20.0, 1.0)],
        "cached": [(3.0, 0.0, 1.0), (4.0, 20.0, 0.5), (4.0, 10.0, 0.7)],
    }
    rounds = {
        name: [dict(zip(columns, row, strict=True)) for row in found] for name, found in numbers.items()
    }
    rows = speed_rows(rounds)
    assert rows["online"] == {"a second": 2.0, "waiting %": 20.0, "a step, s": 2.0, "of online": 1.0}
    assert rows["cached"] == {"a second": 4.0, "waiting %": 10.0, "a step, s": 0.7, "of online": 2.0}
    assert rows["cached, round 2"] == {"a second": 4.0, "waiting %": 20.0, "a step, s": 0.5}
    assert len(rows) == 8


def test_online_and_cached_take_turns(shards, autoencoder, tmp_path, monkeypatch):
    order = []
    original = cache.time_steps
    monkeypatch.setattr(
        cache, "time_steps", lambda *args, cached: order.append(cached) or original(*args, cached=cached)
    )
    config = tiny_config(shards, tmp_path, autoencoder, f"cache.folder={tmp_path / 'cache'}")
    found = compare_cache(config, 1, 2, 2)
    assert order == [False, True, False, True]
    assert [len(rounds) for rounds in found.values()] == [2, 2]
    for speed in (*found["online"], *found["cached"]):
        assert speed["a second"] > 0
        assert 0 <= speed["waiting %"] <= 100
        assert speed["a step, s"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"], "a measurement leaves no run"


def test_a_measurement_keeps_no_optimizer_alive(shards, autoencoder, tmp_path):
    """The moments of the paper's optimizer are 7 GB: two rounds of them would not fit where one does."""
    config = tiny_config(shards, tmp_path, autoencoder)
    model, config = cache.random_or_built(config)
    before = {id(each) for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)}
    cache.time_steps(config, model, 1, 1, cached=False)
    alive = [each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)]
    assert not [each for each in alive if id(each) not in before]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_of_random_weights(shards, tmp_path):
    config = tiny_config(
        shards, tmp_path, "trainer.precision=bf16-mixed", "trainer.gradient_checkpointing=true"
    )
    step = measure_step(config, 1)
    assert step["trained weights"] > 100_000
    assert step["a step, s"] > 0
    assert step["peak GiB"] > 0.1


def test_two_processes_need_two_cores(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.os, "sched_getaffinity", lambda _: {0}, raising=False)
    with pytest.raises(UserError, match="need two cores"):
        compare_processes(tiny_config(shards, tmp_path), 2)


@pytest.mark.parametrize("option", ["--steps", "--warm-up", "--images", "--size", "--repeats"])
def test_mistakes_are_one_line(option, capsys):
    assert cache.main([option, "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert option in error
    assert error.count("\n") == 1


def test_one_step_and_two_processes_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        cache.main(["--step", "--ddp"])
    assert "not allowed with" in capsys.readouterr().err


SMALL = ["--images=8", "--batch-size=2", "--steps=1", "--warm-up=1", "--workers=0", "--threads=1"]


def test_the_command_prints_a_table(tmp_path, capsys):
    threads = torch.get_num_threads()
    out = tmp_path / "n.json"
    try:
        assert cache.main([*SMALL, "--repeats=1", "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    title = "training, toy size, 64 px, batch 2"
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith(title))
    assert [line.split()[0] for line in lines[head + 1 : head + 3]] == ["online", "cached"]
    rows = json.loads(out.read_text())["tables"][title]
    assert list(rows) == ["online", "cached", "online, round 1", "cached, round 1"]


def test_one_step_and_two_processes_have_tables_of_their_own(tmp_path, monkeypatch):
    step = {"trained weights": 9.0, "a step, s": 2.0, "peak GiB": 1.5}
    monkeypatch.setattr(cache, "measure_step", lambda config, steps: step)
    monkeypatch.setattr(cache, "compare_processes", lambda config, steps: {"one": 4.0, "two": 6.0})
    monkeypatch.setattr(cache, "render_scenes", lambda folder, count, size: None)
    out = tmp_path / "n.json"
    for option, table in (
        ("--step", {"one optimizer step, toy size, 64 px, batch 2": {"online": step}}),
        ("--ddp", {"training, cached, toy size, 64 px, batch 2": {
            "one": {"a second": 4.0, "of the first": 1.0}, "two": {"a second": 6.0, "of the first": 1.5}}}),
    ):  # fmt: skip
        assert cache.main([option, "--batch-size=2", "--json", str(out)]) == 0
        assert json.loads(out.read_text())["tables"] == table


def test_the_paper_s_step_fits_into_little_memory(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(cache, "measure_step", lambda config, steps: made.append(config) or {"peak GiB": 1.0})
    monkeypatch.setattr(cache, "synthetic_shards", lambda *sizes: None)
    out = str(tmp_path / "n.json")
    assert cache.main(["--paper", "--step", "--json", out, "optimizer.fused=true"]) == 0
    (config,) = made
    assert (config.trainer.gradient_checkpointing, config.trainer.precision) == (True, "bf16-mixed")
    assert (config.model.image_size, config.data.batch_size, config.optimizer.fused) == (256, 1, True)
    assert not config.autoencoder_from


def test_a_kind_of_run_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(cache, "measure", lambda options: {options.json.name: {}})
    for options, name in (
        ([], "cache"),
        (["--paper", "--step"], "cache_paper_step"),
        (["--ddp"], "cache_ddp"),
    ):
        assert cache.main(options) == 0
        assert json.loads((tmp_path / f"{name}.json").read_text())["tables"] == {f"{name}.json": {}}
    assert cache.main(["--ddp", "--json", str(tmp_path / "mine.json")]) == 0
    assert (tmp_path / "mine.json").is_file()
