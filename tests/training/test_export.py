"""A run that is stopped leaves a model where it can, and loses nothing where it cannot."""

from __future__ import annotations

import errno
import os
import signal
from typing import Any

import pytest

import pbe.training.run as module
from tests.training.tiny import Watch, checkpoint, run, send, tiny_config, weights


def test_a_full_disk_costs_the_model_of_a_stop_and_nothing_else(
    shards, autoencoder, tmp_path, monkeypatch, caplog
):
    config = tiny_config(shards, tmp_path, autoencoder)
    model = tmp_path / "model"

    def full(*_: Any) -> None:
        assert checkpoint(tmp_path)["global_step"] == 2, "the checkpoint comes first"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_model", full)
        result = run(config, Watch(2, send(signal.SIGTERM)))
    assert (result.steps, result.stopped_by) == (2, signal.SIGTERM)
    (told,) = [text for text in caplog.messages if "could not write the model" in text]
    assert told.endswith(f"to '{model}': No space left on device; make room: the same command resumes")
    assert run(config).steps == 3


def test_what_a_killed_process_left_half_written_goes(shards, autoencoder, tmp_path):
    left = tmp_path / "model" / ".saving-abc"
    left.mkdir(parents=True)
    (left / "unet.safetensors").write_bytes(b"half")
    run(tiny_config(shards, tmp_path, autoencoder, "trainer.max_steps=1"))
    assert not left.exists()
    assert weights(tmp_path / "model")


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_stop_before_the_first_step_leaves_no_model(shards, autoencoder, tmp_path, number: int):
    result = run(tiny_config(shards, tmp_path, autoencoder), Watch(0, send(number), "on_validation_start"))
    assert (result.steps, result.stopped_by) == (0, number)
    assert not (tmp_path / "model").exists()
