"""The search for a batch size: its order, its processes, and a real trial."""

from __future__ import annotations

import importlib
import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import train
from pbe.config import Config
from pbe.errors import UserError
from pbe.training.plan import find_batch_size, measure, trial_config
from pbe.training.trials import MemoryWatch, Trial, available_memory, recommend, search, try_size
from tests.programs import FORKS
from tests.training.tiny import tiny_config, write_config


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The trials of batch_trials.py, under a name that other processes can import them by."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("batch_trials")


def limited(most: int, largest: int = 10_000):
    """Return a trial of sizes of which those up to ``most`` fit; 16 is the fastest."""
    return lambda size: Trial(size, size <= most, 100.0 - abs(size - 16), 10**8 * size, largest)


@pytest.mark.parametrize(
    ("most", "tried"),
    [
        (0, [1]),
        (1, [1, 2]),
        (3, [1, 2, 4, 3]),
        (5, [1, 2, 4, 8, 6, 5]),
        (100, [1, 2, 4, 8, 16, 32, 64, 128, 96, 112, 104]),
    ],
)
def test_sizes_are_doubled_then_the_gap_is_halved(most: int, tried: list[int]):
    trials = search(limited(most))
    assert [trial.size for trial in trials] == tried
    fitting = [trial.size for trial in trials if trial.fits]
    assert not fitting or most - max(fitting) <= max(fitting) // 8


def test_no_batch_is_larger_than_an_epoch():
    trials = search(limited(10_000, largest=11))
    assert [trial.size for trial in trials] == [1, 2, 4, 8, 11]
    assert "an epoch fills no larger batch than 11" in recommend(trials, 0)[-1]


def test_the_largest_and_the_fastest_are_recommended():
    lines = recommend(search(limited(100)), 10**10)
    assert lines == [
        "largest that fits: data.batch_size=96",
        "fastest: data.batch_size=16 (100.00 samples a second)",
    ]
    noted = [replace(trial, note="no cache") for trial in search(limited(2))]
    assert recommend(noted, 10**10)[-1] == "note: no cache"
    with pytest.raises(UserError, match=r"not even a batch of one fits into 2\.00 GB"):
        recommend(search(limited(0)), 2 * 10**9)


def test_a_limit_ends_the_trial_and_not_the_search(kinds, monkeypatch, capsys):
    monkeypatch.setattr("pbe.training.plan.measure", kinds.greedy)
    # 40 MB a sample and a tenth of a GB: two fit, four do not
    trials = find_batch_size(Config(), 0.1)
    assert [(trial.size, trial.fits) for trial in trials] == [(1, True), (2, True), (4, False), (3, False)]
    assert trials[1].peak - trials[0].peak == pytest.approx(kinds.EACH, rel=0.3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "limit: 0.10 GB of memory"
    assert [line.split()[0] for line in lines[2:6]] == ["1", "2", "4", "3"]
    assert lines[4].split()[1:] == ["does", "not", "fit"]
    assert lines[6] == "largest that fits: data.batch_size=2"


@pytest.mark.parametrize("name", ["killed", "refused"])
def test_a_death_by_lack_of_memory_is_an_answer(kinds, name: str):
    assert try_size(getattr(kinds, name), Config(), 8, 10**12) == Trial(8, fits=False)


def test_other_ends_are_one_line(kinds):
    with pytest.raises(UserError, match=r"^no such shards$"):
        try_size(kinds.mistaken, Config(), 1, 0)
    with pytest.raises(
        UserError, match="a batch of 3: the trial ended with status 1: ZeroDivisionError: size 3"
    ):
        try_size(kinds.broken, Config(), 3, 0)


def test_a_real_trial_makes_steps_and_leaves_nothing(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", "task=autoencoder", "trainer.accumulate=4")
    result = try_size(measure, config, 4, 10**12)
    assert (result.size, result.fits, result.largest) == (
        4,
        True,
        4,
    )  # eight samples, two micro-batches a step
    assert result.samples_per_second > 0
    assert 10**8 < result.peak < 10**10
    assert not (tmp_path / "run").exists()


def test_a_trial_is_the_run_with_what_begins_later(shards):
    config = tiny_config(
        shards, Path("nowhere"), "autoencoder_loss.adversarial_start=500", "trainer.accumulate=8"
    )
    tried = trial_config(config, 5)
    assert (tried.data.batch_size, tried.trainer.accumulate, tried.autoencoder_loss.adversarial_start) == (
        5,
        2,
        0,
    )
    assert replace(tried.model) == config.model


def test_the_command_refuses_what_makes_no_sense(shards, tmp_path, capsys, monkeypatch):
    # a process as the real one, which has imported what a trial needs
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKS)
    file = str(write_config(tmp_path / "tiny.yaml", tiny_config(shards, tmp_path / "run")))
    assert train.main([file, "--memory-limit", "3"]) == 2
    assert "--memory-limit goes with --find-batch-size" in capsys.readouterr().err
    assert train.main([file, "--find-batch-size", "--memory-limit", "-3", "seed=4"]) == 2
    assert "must be a positive number of GB" in capsys.readouterr().err
    assert train.main([file, "--find-batch-size", "--memory-limit", "0.1"]) == 2
    assert "not even a batch of one fits into 0.10 GB" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_memory_is_read_from_the_machine():
    assert 10**7 < MemoryWatch(0).peak < 10**12
    assert 10**7 < available_memory() < 10**14
