"""Two processes train the autoencoder, its discriminator included, as one does with the same global batch."""

from __future__ import annotations

import pytest

from pbe.training.monitoring.loggers import read_curve
from tests.programs import run_ranks
from tests.training.test_distributed import with_two
from tests.training.tiny import run, tiny_config, weights, write_config

SETTINGS = (
    "task=autoencoder", "optimizer.eps=1e-3", "optimizer.gradient_clip=0.5", "trainer.max_steps=4",
    "autoencoder_loss.adversarial_weight=0.1", "autoencoder_loss.adversarial_adaptive=false",
    "autoencoder_loss.adversarial_start=2", "autoencoder_loss.discriminator_layers=2",
    "autoencoder_loss.discriminator_channels=16", "autoencoder_loss.masked_weight=3",
    "model.autoencoder.mask_aware_decoder=true",
)  # fmt: skip
NAMES = {"train/loss": 4, "train/l1": 4, "train/gradient_norm": 4, "train/discriminator": 2, "val/loss": 2}


@pytest.mark.slow  # of distributed runs the plain, the sharded and the interrupted one are in every test run
def test_two_processes_are_one_with_a_discriminator(shards, tmp_path, project_root):
    write_config(tmp_path / "two.yaml", tiny_config(shards, tmp_path / "two", *SETTINGS))
    command = with_two(tmp_path / "two", "ddp", "data.batch_size=2")
    run_ranks(project_root / "train.py", *command, told=tmp_path)
    run(tiny_config(shards, tmp_path / "one", *SETTINGS, "data.batch_size=4"))
    for name, rows in NAMES.items():
        one, two = (dict(read_curve(tmp_path / kind / "metrics.csv", name)) for kind in ("one", "two"))
        assert len(one) == rows
        assert two == pytest.approx(one, rel=1e-4), name
    first, second = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    floats = [name for name in first if first[name].is_floating_point()]
    assert max(float((first[name] - second[name]).abs().max()) for name in floats) < 1e-5
