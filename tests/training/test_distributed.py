"""Two processes train as one does: the same losses, and either goes on where the other stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pbe.training.loggers import read_curve
from tests.training.tiny import run, tiny_config, weights, write_config

# a large epsilon: Adam divides by the gradient's size and would blow up rounding where it is near zero
SETTINGS = ("optimizer.eps=1e-3", "trainer.validate_every=2", "trainer.validation_samples=5")
NAMES = (
    "train/loss",
    "train/loss_simple",
    "train/gradient_norm",
    "val/loss",
    "val/loss_t500",
    "val/loss_band",
)
LIMIT = 280  # seconds


def train_with_two(project_root: Path, folder: Path, *arguments: str) -> str:
    file = folder.parent / f"{folder.name}.yaml"
    command = [sys.executable, "train.py", str(file), "trainer.devices=2", "trainer.strategy=ddp", *arguments]
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_are_one_with_the_same_global_batch(shards, autoencoder, tmp_path, project_root):
    config = tiny_config(shards, tmp_path / "two", autoencoder, *SETTINGS, "trainer.max_steps=2")
    write_config(tmp_path / "two.yaml", config)
    said = train_with_two(project_root, tmp_path / "two", "data.batch_size=2")
    assert said.count("2 steps, ") == 1, "one process speaks for both"
    straight = run(
        tiny_config(
            shards, tmp_path / "one", autoencoder, *SETTINGS, "trainer.max_steps=4", "data.batch_size=4"
        )
    )
    # the second half by one process: the epoch and the order of its global batches go on
    again = run(
        tiny_config(
            shards, tmp_path / "two", autoencoder, *SETTINGS, "trainer.max_steps=4", "data.batch_size=4"
        )
    )
    for name in NAMES:
        one, two = (read_curve(tmp_path / kind / "metrics.csv", name) for kind in ("one", "two"))
        assert [step for step, _ in two] == [step for step, _ in one], name
        assert len(one) >= 3
        assert dict(two) == pytest.approx(dict(one), rel=1e-5), name
    first, second = weights(straight.model_dir), weights(again.model_dir)
    assert (
        max(float((first[k] - second[k]).abs().max()) for k in first if first[k].is_floating_point()) < 1e-5
    )
