"""A run that is stopped, or dies, and starts again ends exactly like one that was never interrupted."""

from __future__ import annotations

import logging
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pbe.config import Config, TrainerConfig
from pbe.training.monitoring.loggers import read_curve
from pbe.training.resume.callback import Checkpoints, ends_step
from pbe.training.resume.files import SafeCheckpointIO
from pbe.training.resume.signals import StopSignals
from tests.training.tiny import (
    Watch,
    checkpoint,
    crash,
    differing,
    logged,
    run,
    send,
    tiny_config,
    weights,
)

# Four micro-batches of two make an epoch, so that stops fall inside an epoch and at its end.
LENGTH = ("trainer.max_steps=11", "trainer.validate_every=3", "trainer.checkpoint_every=2")
KINDS = {
    "online": (),
    "cached": ("cache.folder={folder}", "cache.variants=1"),
    "accumulating": ("trainer.accumulate=2", "data.batch_size=1"),
    "autoencoder": ("task=autoencoder",),
    "muon": ("optimizer.name=muon",),
}
# What happens one after the other, until the last start, which is left alone.
MISHAPS = [
    ("SIGTERM before the first checkpoint", lambda: Watch(1, send(signal.SIGTERM))),
    ("SIGTERM while the data are got ready", lambda: Watch(0, send(signal.SIGTERM), "on_fit_start")),
    ("death between checkpoints", lambda: Watch(3, crash)),
    ("death in a validation", lambda: Watch(6, crash, "on_validation_start")),
    ("SIGINT at the end of an epoch", lambda: Watch(8, send(signal.SIGINT))),
    ("death two steps later", lambda: Watch(10, crash)),
    ("SIGTERM at the last step", lambda: Watch(11, send(signal.SIGTERM))),
]
# All of it happens to one kind, and all of it once more to the others together.
SHARES = {"cached": (1, 2, 4), "accumulating": (0, 3, 5), "autoencoder": (2, 4, 6)}


def exported(config: Config) -> list[str]:
    """Return the names in which the exported model is not the average that the checkpoint holds."""
    kept, model = checkpoint(config.output_dir)["ema"], weights(Path(config.output_dir) / "model")
    return differing(
        {name.removeprefix("model."): value for name, value in kept.items()},
        {name: value for name, value in model.items() if f"model.{name}" in kept},
    )


@pytest.mark.parametrize(
    "kind", [*(kind for kind in KINDS if kind != "muon"), pytest.param("muon", marks=pytest.mark.slow)]
)
def test_interruptions_change_nothing(shards, autoencoder, tmp_path, kind: str):
    settings = [autoencoder, *LENGTH, *(text.format(folder=tmp_path / "cache") for text in KINDS[kind])]
    straight = run(tiny_config(shards, tmp_path / "straight", *settings))
    config = tiny_config(shards, tmp_path / "interrupted", *settings)
    for name, mishap in (MISHAPS[number] for number in SHARES.get(kind, range(len(MISHAPS)))):
        watch = mishap()
        result = run(config, watch)
        assert watch.action is None, f"{name}: it never came to that"
        assert result is None or result.stopped_by in (signal.SIGTERM, signal.SIGINT), name
        if result is not None and watch.step:
            assert exported(config) == [], f"{name}: no model of the step that it stopped at"
    finished = run(config)
    assert (finished.steps, finished.stopped_by) == (11, 0)
    assert differing(weights(straight.model_dir), weights(finished.model_dir)) == []
    assert (straight.model_dir / "config.json").read_text() == (
        finished.model_dir / "config.json"
    ).read_text()
    first, second = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "interrupted")
    assert differing(first["state_dict"], second["state_dict"]) == []
    assert differing(first["ema"], second["ema"]) == []
    # loss by loss, in order, no row missing and none twice
    assert logged(tmp_path / "interrupted") == logged(tmp_path / "straight")


def test_a_finished_run_is_passed_over(finished, shards, autoencoder, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before, rows = weights(tmp_path / "model"), logged(tmp_path)
    again = run(tiny_config(shards, tmp_path, autoencoder))
    assert (again.steps, again.stopped_by) == (3, 0)
    assert logged(tmp_path) == rows
    assert differing(before, weights(again.model_dir)) == []


def test_a_start_anew_clears_the_log_of_a_run_that_never_saved(shards, autoencoder, tmp_path):
    config = tiny_config(shards, tmp_path, autoencoder, "trainer.max_steps=4")
    run(config, Watch(3, crash))
    assert not (tmp_path / "checkpoints").exists()
    run(config)
    assert [step for step, _, _ in logged(tmp_path, "train/loss_simple")] == [1, 2, 3, 4]


def test_resume_from_a_named_checkpoint(shards, autoencoder, tmp_path):
    settings = [autoencoder, "trainer.max_steps=6"]
    straight = run(tiny_config(shards, tmp_path / "a", *settings, "trainer.checkpoint_every=2"))
    named = f"trainer.resume={tmp_path / 'a' / 'checkpoints' / 'step=0000004.ckpt'}"
    branch = run(tiny_config(shards, tmp_path / "b", *settings, named))
    assert branch.steps == 6
    assert differing(weights(straight.model_dir), weights(branch.model_dir)) == []
    assert [step for step, _, _ in logged(tmp_path / "b", "train/loss_simple")] == [5, 6]


def test_a_run_goes_on_in_the_middle_of_an_epoch_with_other_micro_batches(shards, autoencoder, tmp_path):
    """Steps stay whole and validations due, whatever the batches were before."""
    settings = [autoencoder, "trainer.validate_every=2", "optimizer.eps=1e-3"]
    whole = [*settings, "data.batch_size=4"]
    run(tiny_config(shards, tmp_path / "a", *whole, "trainer.max_steps=6"))
    run(tiny_config(shards, tmp_path / "b", *whole, "trainer.max_steps=1"))
    halves = ("data.batch_size=2", "trainer.accumulate=2")
    quarters = ("data.batch_size=1", "trainer.accumulate=4")
    run(tiny_config(shards, tmp_path / "b", *settings, *halves, "trainer.max_steps=3"))
    run(tiny_config(shards, tmp_path / "b", *settings, *quarters, "trainer.max_steps=5"))
    run(tiny_config(shards, tmp_path / "b", *whole, "trainer.max_steps=6"))
    for name in ("train/loss", "train/gradient_norm", "val/loss"):
        first, second = (read_curve(tmp_path / kind / "metrics.csv", name) for kind in "ab")
        # the shorter runs validated their ends too
        assert dict(first).keys() <= dict(second).keys(), name
        assert name == "val/loss" or len(second) == 6
        assert {step: dict(second)[step] for step, _ in first} == pytest.approx(dict(first), rel=1e-4), name


def test_a_longer_run_goes_on_where_a_finished_one_ended(finished, shards, autoencoder, tmp_path):
    shutil.copytree(finished, tmp_path / "a")
    longer = run(tiny_config(shards, tmp_path / "a", autoencoder, "trainer.max_steps=6"))
    straight = run(tiny_config(shards, tmp_path / "b", autoencoder, "trainer.max_steps=6"))
    assert differing(weights(straight.model_dir), weights(longer.model_dir)) == []


def test_a_run_that_takes_to_the_cache_says_that_its_data_begin_anew(shards, autoencoder, tmp_path, caplog):
    settings = (autoencoder, "trainer.checkpoint_every=1")
    with caplog.at_level(logging.INFO, "pbe"):
        run(tiny_config(shards, tmp_path / "run", *settings, "trainer.max_steps=1"))
        assert not any("begins anew" in message for message in caplog.messages)
        cached = (*settings, f"cache.folder={tmp_path / 'cache'}", "trainer.max_steps=2")
        assert run(tiny_config(shards, tmp_path / "run", *cached)).steps == 2
    assert any("between samples made online and a latent cache" in message for message in caplog.messages)


def test_signal_handlers_are_given_back(shards, autoencoder, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    run(tiny_config(shards, tmp_path, autoencoder), Watch(1, send(signal.SIGTERM)))
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_signal_interrupts_at_once():
    stop = StopSignals()
    with stop.listening():
        send(signal.SIGINT)()
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)()


class StubTrainer:
    """As much of a trainer as the checkpoint callback needs."""

    accumulate_grad_batches, is_last_batch, is_global_zero, max_steps, world_size = 1, False, True, 1000, 1

    def __init__(self) -> None:
        self.global_step = 0

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        assert weights_only is False
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(self.global_step))


def saved(folder: Path, keep: int, steps: int, every: int = 0) -> list[str]:
    trainer = StubTrainer()
    options = TrainerConfig(checkpoint_every=10, keep_checkpoints=keep, keep_every=every)
    callback = Checkpoints(folder / str(keep), options, StopSignals(), SafeCheckpointIO())
    for step in range(1, steps + 1):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, None, None, None, step - 1)
    return sorted(path.name for path in (folder / str(keep)).glob("*.ckpt"))


@pytest.mark.parametrize(("keep", "kept"), [(2, [40, 50]), (1, [50]), (0, []), (-1, [10, 20, 30, 40, 50])])
def test_as_many_checkpoints_stay_as_asked_for(tmp_path, keep: int, kept: list[int]):
    assert saved(tmp_path, keep, 55) == ["last.ckpt", *(f"step={step:07d}.ckpt" for step in kept)]
    assert (tmp_path / str(keep) / "last.ckpt").read_text() == "50"


@pytest.mark.parametrize(("keep", "kept"), [(0, [30, 60]), (1, [30, 60, 80]), (2, [30, 60, 70, 80])])
def test_every_nth_checkpoint_stays_for_ever(tmp_path, keep: int, kept: list[int]):
    assert saved(tmp_path, keep, 80, 30) == ["last.ckpt", *(f"step={step:07d}.ckpt" for step in kept)]


def test_a_kept_checkpoint_is_a_copy_of_the_last_one(shards, autoencoder, tmp_path):
    run(tiny_config(shards, tmp_path, autoencoder, "trainer.checkpoint_every=3"))
    folder = tmp_path / "checkpoints"
    assert (folder / "last.ckpt").read_bytes() == (folder / "step=0000003.ckpt").read_bytes()
    assert not (folder / "last.ckpt").samefile(folder / "step=0000003.ckpt")
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["last.ckpt", "step=0000003.ckpt"]


def test_a_step_ends_with_its_last_micro_batch_or_the_epoch():
    trainer = StubTrainer()
    trainer.accumulate_grad_batches = 3
    assert [ends_step(trainer, index) for index in range(6)] == [False, False, True] * 2
    trainer.is_last_batch = True
    assert ends_step(trainer, 6)


def test_a_checkpoint_holds_the_average_and_goes_without_one(finished, shards, autoencoder, tmp_path):
    run(tiny_config(shards, tmp_path / "without", autoencoder, "optimizer.ema_decay=0"))
    averaged, plain = checkpoint(finished), checkpoint(tmp_path / "without")
    assert "ema" not in plain
    assert differing(averaged["state_dict"], plain["state_dict"]) == []
    trained = {
        name for name, value in averaged["ema"].items() if not torch.equal(value, plain["state_dict"][name])
    }
    assert len(trained) > 100
    exported = weights(tmp_path / "without" / "model")
    assert torch.equal(exported["unet.conv_in.weight"], plain["state_dict"]["model.unet.conv_in.weight"])
