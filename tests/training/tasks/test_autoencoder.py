"""Stage one: its terms, its scale factor, and the run as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pbe.checkpoints.native import load_model
from pbe.config import Config
from pbe.data.datamodule import TrainingData
from pbe.models import LatentDiffusion
from pbe.training.monitoring.loggers import read_curve
from pbe.training.tasks.autoencoder import (
    AutoencoderTask,
    measure_scale_factor,
    psnr,
    reconstruction_terms,
)
from pbe.training.tasks.encoding import to_pixels
from tests.training.conftest import AUTOENCODER_STAGE
from tests.training.tiny import checkpoint, run, tiny_config


def test_terms_of_a_known_error():
    pictures = torch.zeros(1, 3, 4, 5)
    decoded = torch.zeros(1, 3, 4, 5)
    decoded[..., 2] = 0.5  # one column of five
    terms = reconstruction_terms(decoded, pictures)
    assert float(terms["l1"]) == pytest.approx(0.1)
    assert float(terms["l2"]) == pytest.approx(0.05)
    # two of the four differences along a row are off by a half, none along a column
    assert float(terms["gradient"]) == pytest.approx(0.25)


def test_a_constant_shift_costs_no_gradient():
    pictures = torch.rand(2, 3, 4, 4)
    assert float(reconstruction_terms(pictures + 0.25, pictures)["gradient"]) == pytest.approx(0.0, abs=1e-6)


def test_psnr_of_a_known_error():
    pictures = torch.zeros(2, 3, 4, 4)
    # an error of 0.2 in [-1, 1] is one of 0.1 in [0, 1]: 20 dB
    assert float(psnr(pictures + 0.2, pictures)) == pytest.approx(20.0, abs=1e-4)
    assert float(psnr(pictures + 5.0, pictures + 1.0)) == 100.0  # clamped before it is compared


@pytest.fixture(scope="module")
def stage(workshop: Path, shards: Path) -> tuple[Path, Config]:
    """The run that trained the autoencoder of all tests, and its configuration."""
    folder = workshop / "autoencoder"
    return folder, tiny_config(shards, folder, *AUTOENCODER_STAGE)


def test_only_the_autoencoder_is_trained():
    config = tiny_config(Path("nowhere"), Path("nowhere"), "task=autoencoder")
    task = AutoencoderTask(config, LatentDiffusion(config.model))
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert trained == {f"model.autoencoder.{n}" for n, _ in task.model.autoencoder.named_parameters()}


def test_the_share_of_masked_images_is_drawn_by_sample(shards):
    overrides = ["task=autoencoder", "autoencoder_loss.masked_share=0.25"]
    config = tiny_config(shards, Path("nowhere"), *overrides)
    task = AutoencoderTask(config, LatentDiffusion(config.model))
    image = torch.full((400, 3, 2, 2), 255, dtype=torch.uint8)
    mask = torch.zeros(400, 1, 2, 2, dtype=torch.uint8)
    mask[..., 0, 0] = 255
    batch = {"image": image, "mask": mask, "sample_index": torch.arange(400)}
    pictures = task.images(batch)
    masked = pictures[:, 0, 0, 0] == 0.0
    assert torch.equal(pictures[:, :, 0, 1], torch.ones(400, 3))
    assert abs(float(masked.float().mean()) - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5
    tail = task.images({key: value[300:] for key, value in batch.items()})
    assert torch.equal(tail, pictures[300:])


def test_it_learns(stage):
    folder, _ = stage
    quality = dict(read_curve(folder / "metrics.csv", "val/psnr"))
    assert set(quality) == {0, 100, 200}
    assert quality[200] > quality[0] + 4.0


def test_the_scale_factor_is_measured_and_makes_latents_unit_variance(stage):
    folder, config = stage
    model = load_model(folder / "model")
    scale = model.config.autoencoder.scale_factor
    assert scale != config.model.autoencoder.scale_factor, "0.18215 belongs to Stable Diffusion"
    loader = TrainingData(config).train_dataloader()
    assert measure_scale_factor(model, list(loader)) == pytest.approx(scale, rel=1e-6)
    # and by sampling, on images cropped and masked anew
    torch.manual_seed(0)
    fresh = [batch for _ in range(8) for batch in loader]
    with torch.no_grad():
        images = torch.cat([to_pixels(batch["image"]) for batch in fresh])
        noise = torch.randn(len(images), *model.autoencoder.encode(images[:1]).mean.shape[1:])
        latents = model.encode_images(images, noise)
    assert float(latents.std()) == pytest.approx(1.0, abs=0.02)


def test_the_export_holds_the_averaged_weights(stage):
    folder, _ = stage
    average = checkpoint(folder)["ema"]
    trained = checkpoint(folder)["state_dict"]
    model = load_model(folder / "model")
    exported = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert len(average) == len(list(model.autoencoder.parameters()))
    for name, value in average.items():
        assert torch.equal(exported[name], value), name
    assert any(not torch.equal(trained[name], value) for name, value in average.items())


def test_the_diffusion_stage_takes_autoencoder_and_scale_factor_over(stage, shards, autoencoder, tmp_path):
    folder, _ = stage
    stored = json.loads((folder / "model" / "config.json").read_text())["model"]["autoencoder"]
    # what this configuration says of the autoencoder does not count
    result = run(tiny_config(shards, tmp_path, autoencoder, "model.autoencoder.scale_factor=9"))
    used = json.loads((result.model_dir / "config.json").read_text())["model"]["autoencoder"]
    assert used == stored
    first, second = load_model(folder / "model").autoencoder, load_model(result.model_dir).autoencoder
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_grid_shows_images_and_reconstructions(stage):
    folder, config = stage
    assert [path.name for path in (folder / "grids").iterdir()] == ["step0000200.png"]
    with Image.open(folder / "grids" / "step0000200.png") as grid:
        side = config.data.image_size + 2
        assert grid.size == (2 * side, config.logging.grid_samples * side)
