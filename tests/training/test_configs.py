"""Every configuration that ships is loaded and run for two steps, at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torchvision.models.vgg import cfgs, make_layers

from pbe.config import Config, load_config
from pbe.training.monitoring.loggers import read_curve
from tests.training.tiny import TINY, run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if path.parent.name != "ablations"
)


def shrunk(folder: Path, name: str, *more: str) -> Config:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({"base": str(CONFIGS / name)} | TINY))
    return load_config(file, list(more))


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in place of those that a user brings for the perceptual term."""
    path = tmp_path_factory.mktemp("perceptual") / "vgg.pth"
    torch.manual_seed(3)
    torch.save({f"features.{k}": v for k, v in make_layers(cfgs["D"]).state_dict().items()}, path)
    return path


def test_there_are_configurations():
    assert {
        "autoencoder.yaml",
        "finetune.yaml",
        "object.yaml",
        "paper.yaml",
        "toy.yaml",
        "toy_autoencoder.yaml",
        "toy_distil.yaml",
    } <= set(FILES)
    assert {"debug/fast_dev.yaml", "debug/overfit_one_batch.yaml", "debug/profiler.yaml"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_configuration_runs(name: str, shards: Path, autoencoder: str, vgg: Path, tmp_path: Path):
    plain = load_config(CONFIGS / name)
    cached, whole = bool(plain.cache.folder), autoencoder.partition("=")[2]
    distilled = plain.task == "distillation"  # of what gives zero, and so do both
    places = [
        f"output_dir={tmp_path / 'run'}", autoencoder, "trainer.max_steps=2",
        f"init_from={whole if plain.lora.rank or distilled else 'none'}",
        f"data.prior_shards={shards / 'validation' if plain.data.prior_shards else ''}",
        f"data.train_shards={shards / 'train'}", f"data.validation_shards={shards / 'validation'}",
        "cache.folder=" + (str(tmp_path / "cache") if cached else "''"), "cache.variants=1",
        f"autoencoder_loss.perceptual_vgg={vgg}", "autoencoder_loss.perceptual_linear=''",
        "autoencoder_loss.adversarial_start=1",
    ]  # fmt: skip
    result = run(shrunk(tmp_path, name, *places))
    assert (result.steps, result.stopped_by) == (2, 0)
    losses = read_curve(tmp_path / "run" / "metrics.csv", "train/loss")
    assert [step for step, _ in losses] == [1, 2]
    assert all(0 < value < 100 or (distilled and value == 0) for _, value in losses)
    made = result.model_dir if plain.lora.rank else result.model_dir / "unet.safetensors"
    assert made.is_file()


def test_overfitting_one_batch_makes_its_loss_fall(shards: Path, autoencoder: str, tmp_path: Path):
    more = [
        f"output_dir={tmp_path / 'run'}", autoencoder, "trainer.max_steps=60", "trainer.overfit_batches=1",
        f"data.train_shards={shards / 'train'}", "data.validation_shards=''", "optimizer.learning_rate=4e-3",
        "objective.drop_probability=0", "cache.folder=''",
    ]  # fmt: skip
    run(shrunk(tmp_path, "debug/overfit_one_batch.yaml", *more))
    losses = [value for _, value in read_curve(tmp_path / "run" / "metrics.csv", "train/loss")]
    assert losses[-1] < 0.5 * losses[0]
