"""Checkpoints that are half-written, flipped, or do not fit on the disk, and settings that change."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import pbe.training.resume.files as module
from pbe.config import Config, OptimizerConfig, to_dict
from pbe.errors import UserError
from pbe.training.resume.files import (
    SafeCheckpointIO,
    changed_settings,
    damage,
    duplicate,
    find_checkpoint,
    newest_intact,
    recount_batches,
)
from pbe.training.tasks.diffusion import DiffusionTask
from tests.training.tiny import checkpoint, differing, logged, run, tiny_config, weights


def write(path: Path, step: int) -> Path:
    writer = SafeCheckpointIO()
    writer.save_checkpoint({"global_step": step, "state_dict": {"w": torch.full((1000,), float(step))}}, path)
    assert writer.error is None
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_comes_with_its_checksum_and_nothing_else(tmp_path):
    path = write(tmp_path / "checkpoints" / "last.ckpt", 3)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name("last.ckpt.sha256").read_text() == f"{digest}  last.ckpt\n"
    assert sorted(file.name for file in path.parent.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]
    assert torch.load(path)["state_dict"]["w"][0] == 3.0
    assert damage(path) == ""


@pytest.mark.parametrize("spoil", [flip, lambda p: p.write_bytes(p.read_bytes()[:-100]), Path.touch])
def test_damage_is_found(tmp_path, spoil: Any):
    path = write(tmp_path / "last.ckpt", 3)
    if spoil is Path.touch:
        path.write_bytes(b"")
    else:
        spoil(path)
    assert damage(path) == "its checksum does not match"
    path.with_name("last.ckpt.sha256").unlink()
    if spoil is not flip:  # without a checksum only what cannot be read is found
        assert damage(path) == "it cannot be read"


@pytest.mark.parametrize("death", [1, 2, 3])
def test_a_death_while_a_checkpoint_takes_its_place_leaves_a_whole_one(tmp_path, monkeypatch, death: int):
    path = write(tmp_path / "last.ckpt", 1)
    calls: list[int] = []

    class DeathError(BaseException):
        pass

    def dying(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == death:
                raise DeathError
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", dying(module.os.replace))
        patch.setattr(Path, "write_text", dying(Path.write_text))
        with pytest.raises(DeathError):
            SafeCheckpointIO().save_checkpoint({"global_step": 2, "state_dict": {}}, path)
    assert damage(path) == ""
    assert torch.load(path)["global_step"] == (2 if death == 3 else 1)
    write(path, 4)
    assert damage(path) == ""


def test_the_one_before_a_damaged_checkpoint_is_used_and_said_so(tmp_path, caplog):
    for step in (10, 20, 30):
        duplicate(write(tmp_path / "last.ckpt", step), tmp_path / f"step={step:07d}.ckpt")
    flip(tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO, "pbe"):  # the copy is a file of its own
        assert newest_intact(tmp_path) == tmp_path / "step=0000030.ckpt"
    assert len(caplog.messages) == 1
    assert "last.ckpt' is damaged" in caplog.messages[0]
    assert "its checksum does not match); resuming from 'step=0000030.ckpt' (step 30)" in caplog.messages[0]
    flip(tmp_path / "step=0000030.ckpt")
    caplog.clear()
    with caplog.at_level(logging.INFO, "pbe"):
        assert newest_intact(tmp_path) == tmp_path / "step=0000020.ckpt"
    assert len(caplog.messages) == 2
    assert "its checksum does not match); resuming from 'step=0000020.ckpt' (step 20)" in caplog.messages[1]
    for path in tmp_path.glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no other one is intact; delete the checkpoints to start again"):
        newest_intact(tmp_path)


def test_hard_links_of_older_versions_are_told_about_once(tmp_path, caplog):
    duplicate(write(tmp_path / "last.ckpt", 10), tmp_path / "step=0000010.ckpt")
    write(tmp_path / "last.ckpt", 20)
    (tmp_path / "step=0000020.ckpt").hardlink_to(tmp_path / "last.ckpt")
    flip(tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO, "pbe"):
        assert newest_intact(tmp_path) == tmp_path / "step=0000010.ckpt"
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("kernel", ["copies", "cannot", "is an old one"])
def test_a_copy_is_whole_and_a_file_of_its_own(tmp_path, monkeypatch, kernel: str):
    def refuse(*args: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if kernel == "cannot":
        monkeypatch.setattr(module.os, "copy_file_range", refuse, raising=False)
    elif kernel == "is an old one":
        monkeypatch.delattr(module.os, "copy_file_range", raising=False)
    monkeypatch.setattr(module, "CHUNK", 1000)
    path, target = write(tmp_path / "last.ckpt", 10), tmp_path / "best.ckpt"
    write(target, 5)
    duplicate(path, target)
    assert target.read_bytes() == path.read_bytes()
    assert target.stat().st_ino != path.stat().st_ino
    assert damage(target) == ""


def test_a_copy_that_finds_no_room_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path, target = write(tmp_path / "last.ckpt", 10), write(tmp_path / "best.ckpt", 5)
    monkeypatch.setattr(module.os, "copy_file_range", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        duplicate(path, target)
    assert damage(target) == ""
    assert len(list(tmp_path.iterdir())) == 4


def test_a_named_checkpoint_has_to_be_whole(tmp_path):
    path = write(tmp_path / "last.ckpt", 10)
    flip(path)
    with pytest.raises(UserError, match=r"is damaged or not a checkpoint of this project \(its checksum"):
        find_checkpoint(tiny_config(tmp_path, tmp_path, f"trainer.resume={path}"))


def test_a_full_disk_leaves_the_older_checkpoint_as_it_was(tmp_path, monkeypatch):
    path = write(tmp_path / "last.ckpt", 1)
    before, writer = path.read_bytes(), SafeCheckpointIO()
    full = OSError(errno.ENOSPC, "No space left on device")

    class FullFile(module.QuietFile):
        def write(self, data: bytes) -> int:
            self.error = self.error or (full if len(data) > 1000 else None)
            return super().write(data)

    monkeypatch.setattr(module, "QuietFile", FullFile)
    writer.save_checkpoint({"global_step": 2, "state_dict": {"w": torch.zeros(1000)}}, path)
    assert writer.error is full
    assert path.read_bytes() == before
    assert damage(path) == ""
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]


def test_the_real_file_errors_are_remembered(tmp_path):
    with open("/dev/full", "wb", buffering=0) as raw:
        file = module.QuietFile(raw, hashlib.sha256())
        assert file.write(b"x" * 100) == 100
        assert file.write(b"y") == 1
        file.flush()
    assert file.error is not None
    assert file.error.errno == errno.ENOSPC


def test_training_goes_on_when_a_checkpoint_cannot_be_saved(
    shards, autoencoder, tmp_path, caplog, monkeypatch
):
    settings = [autoencoder, "trainer.max_steps=4", "trainer.checkpoint_every=1"]
    straight = run(tiny_config(shards, tmp_path / "a", *settings))
    save = torch.save

    def sometimes(content: dict[str, Any], file: Any) -> None:
        first = tmp_path / "b" / "checkpoints" / "step=0000001.ckpt"
        if first.exists() and content["global_step"] in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr(module.torch, "save", sometimes)
    with caplog.at_level(logging.ERROR, "pbe"):
        result = run(tiny_config(shards, tmp_path / "b", *settings))
    assert [message.split(";")[0] for message in caplog.messages] == [
        f"could not save the checkpoint of step {step}: No space left on device" for step in (2, 3)
    ]
    assert "that of step 1 is as it was, and training goes on" in caplog.messages[0]
    assert checkpoint(tmp_path / "b")["global_step"] == 4
    assert differing(weights(straight.model_dir), weights(result.model_dir)) == []


def test_a_run_goes_on_from_the_one_before_a_damaged_checkpoint(shards, autoencoder, tmp_path):
    settings = [autoencoder, "trainer.checkpoint_every=2", "trainer.max_steps=6"]
    straight = run(tiny_config(shards, tmp_path / "a", *settings))
    run(tiny_config(shards, tmp_path / "b", *settings[:2], "trainer.max_steps=5"))
    flip(tmp_path / "b" / "checkpoints" / "last.ckpt")
    again = run(tiny_config(shards, tmp_path / "b", *settings))
    assert again.steps == 6
    assert differing(weights(straight.model_dir), weights(again.model_dir)) == []
    losses = [row for row in logged(tmp_path / "b", "train/loss") if row[0] <= 6]
    assert losses == logged(tmp_path / "a", "train/loss")


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(shards, autoencoder, tmp_path):
    settings = ["trainer.max_steps=8", "trainer.validate_every=2", "trainer.keep_best=true"]
    run(tiny_config(shards, tmp_path, autoencoder, *settings, "optimizer.learning_rate=3e-3"))
    losses = {step: float(v) for step, name, v in logged(tmp_path, "val/loss") if name == "val/loss" and step}
    best = min(losses, key=losses.__getitem__)
    note = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert (note["step"], note["val/loss"]) == (best, pytest.approx(losses[best]))
    assert torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=False)["global_step"] == best
    assert damage(tmp_path / "checkpoints" / "best.ckpt") == ""


def test_a_validation_without_numbers_is_never_the_best(shards, autoencoder, tmp_path, monkeypatch):
    def failing(task: DiffusionTask, name: str, value: torch.Tensor, **how: Any) -> None:
        broken = name == "val/loss" and task.global_step == 2
        pl.LightningModule.log(task, name, value * float("nan") if broken else value, **how)

    monkeypatch.setattr(DiffusionTask, "log", failing)
    settings = ["trainer.max_steps=2", "trainer.validate_every=1", "trainer.keep_best=true"]
    run(tiny_config(shards, tmp_path, autoencoder, *settings))
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["step"] == 1


def test_minutes_are_a_reason_to_save(shards, autoencoder, tmp_path):
    run(tiny_config(shards, tmp_path, autoencoder, "trainer.checkpoint_minutes=1e-9"))
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step=*.ckpt"))
    assert names == ["step=0000002.ckpt", "step=0000003.ckpt"]


def test_changed_settings_are_named():
    old, new = Config(output_dir="a"), Config(output_dir="b", optimizer=OptimizerConfig(learning_rate=2e-5))
    new.trainer.resume, new.data.sample.squash, new.trainer.keep_best = "never", True, True
    stored = to_dict(old)
    stored["trainer"].pop("keep_best")  # a checkpoint of before there was such a setting
    stored["trainer"].pop("keep_every")
    assert changed_settings(stored, new) == [
        "data.sample.squash False -> True",
        "optimizer.learning_rate 1e-05 -> 2e-05",
        "trainer.keep_best False -> True",
    ]
    assert changed_settings(to_dict(old), old) == []


def test_a_changed_configuration_is_said_when_a_run_goes_on(shards, autoencoder, tmp_path, caplog):
    run(tiny_config(shards, tmp_path, autoencoder, "trainer.max_steps=1"))
    with caplog.at_level(logging.INFO, "pbe"):
        run(tiny_config(shards, tmp_path, autoencoder, "trainer.max_steps=2", "optimizer.eps=1e-6"))
    (told,) = [message for message in caplog.messages if "changed settings" in message]
    assert told.startswith("resuming from step 1 of")
    assert told.endswith("changed settings: optimizer.eps 1e-08 -> 1e-06; trainer.max_steps 1 -> 2")


def counted(step: int, accumulate: int, in_epoch: int) -> dict[str, Any]:
    def counters(done: int) -> dict[str, int]:
        return {"ready": done, "started": done, "processed": done, "completed": done - 1}

    progress = {"total": counters(step * accumulate), "current": counters(in_epoch)}
    loops = {"fit_loop": {"epoch_loop.batch_progress": progress}}
    return {"global_step": step, "config": {"trainer": {"accumulate": accumulate}}, "loops": loops}


@pytest.mark.parametrize(("samples", "in_epoch"), [(24, 6), (0, 10)])
def test_the_same_batches_change_nothing(samples: int, in_epoch: int):
    stored = counted(13, 2, in_epoch)
    before = copy.deepcopy(stored)
    recount_batches(stored, samples, 4, 2)
    assert stored == before


def test_other_batches_are_counted_in_whole_steps():
    stored = counted(13, 2, 6)
    recount_batches(stored, 24, 2, 4)
    progress = stored["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["total"] == {"ready": 52, "started": 52, "processed": 52, "completed": 51}
    assert progress["current"] == {"ready": 12, "started": 12, "processed": 12, "completed": 11}


def test_a_place_between_two_steps_counts_as_the_one_before():
    stored = counted(3, 1, 3)
    recount_batches(stored, 12, 2, 4)
    assert stored["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 4
