"""Every precision that is offered trains, in every way to train, and keeps what has to be kept in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pbe.config import CHOICES, TrainerConfig
from pbe.training.setup import precision_plugin
from tests.training.tiny import checkpoint, logged, run, tiny_config, weights

KINDS = {
    "online": ("logging.grid_every=3", "trainer.gradient_checkpointing=true"),
    "cached": ("cache.variants=1", "trainer.accumulate=2", "data.batch_size=1"),
    "autoencoder": (
        "task=autoencoder", "model.autoencoder.mask_aware_decoder=true", "logging.grid_every=3",
        "autoencoder_loss.adversarial_weight=0.5", "autoencoder_loss.adversarial_start=1",
        "autoencoder_loss.discriminator_layers=2", "autoencoder_loss.discriminator_channels=16",
    ),
}  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [float(value) for _, name, value in logged(folder, "train/loss") if name == "train/loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_precision_trains(shards, autoencoder, tmp_path, kind: str):
    settings = [autoencoder, *(text.format(folder=tmp_path) for text in KINDS[kind])]
    exact: list[float] = []
    for number, precision in enumerate(CHOICES["trainer.precision"], list(KINDS).index(kind)):
        more = [f"trainer.precision={precision}", "cache.folder=" + str(tmp_path / f"cache-{precision}")]
        wanted = [*settings, *(more if kind == "cached" else more[:1])]
        folder = tmp_path / precision
        if number % 2 == 0:  # in every second pair
            assert run(tiny_config(shards, folder, *wanted, "trainer.max_steps=2")).steps == 2
        assert run(tiny_config(shards, folder, *wanted)).steps == 3, "goes on"
        exact = exact or losses(folder)
        assert losses(folder) == pytest.approx(exact, rel=0.05), precision
        saved = checkpoint(folder)
        trained = "autoencoder" if kind == "autoencoder" else "unet"
        kept = next(v for k, v in saved["state_dict"].items() if k.startswith(f"model.{trained}"))
        assert kept.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
        assert {value.dtype for value in saved["ema"].values()} == {torch.float32}
        exported = {k: v for k, v in weights(folder / "model").items() if v.is_floating_point()}
        assert {value.dtype for value in exported.values()} == {torch.float32}
        for name, value in saved["ema"].items():  # the averages themselves, not what bfloat16 holds of them
            part, _, key = name.removeprefix("model.").partition(".")
            assert torch.equal(exported[f"{part}.{key}"], value), name


def test_what_lightning_does_by_itself_is_left_to_it():
    assert precision_plugin(TrainerConfig(precision="32-true"), cpu=True) is None
    assert precision_plugin(TrainerConfig(precision="bf16-mixed"), cpu=True) is None
    assert precision_plugin(TrainerConfig(precision="16-mixed"), cpu=False) is None
    assert precision_plugin(TrainerConfig(precision="16-mixed"), cpu=True).scaler is not None
