"""Eight samples learned by heart: the whole of training, end to end, does what it is for.

Two scenes, in each the same hole for four objects: nothing but the exemplar says which one to paint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pbe.config import Config
from pbe.data.datamodule import TrainingData
from pbe.data.dataset import collate
from pbe.editing import PaintByExample
from pbe.models import LatentDiffusion
from pbe.training.setup import build_model
from pbe.training.tasks.diffusion import VALIDATION_TIMESTEPS, DiffusionTask
from pbe.training.tasks.encoding import Draws, draw, encode_batch
from tests.training.tiny import OBJECTS, PRETRAINED_TOWER, run, tiny_config

GUIDANCE, STEPS = 3.0, 20
FALL = 10.0  # times that the loss falls at least
MARGIN = 15.0  # of 255: mean difference in the hole between two exemplars

OVERFIT = (
    *PRETRAINED_TOWER,
    "data.validation_shards=''",
    "data.batch_size=8",
    "data.sample.arbitrary_mask_share=0",
    "data.sample.extend_fraction=0",
    "data.sample.shrink_fraction=0",
    "cache.variants=1",
    "optimizer.learning_rate=4e-3",
    "optimizer.warmup_steps=20",
    "optimizer.decay=cosine",
    "optimizer.ema_decay=0.98",
    "trainer.max_steps=600",
    "logging.every=100",
)


@dataclass
class Overfit:
    """A model trained on eight samples.

    Attributes:
        samples: the eight, in the order of ``keys``.
        before: loss on the fixed grid with the weights that training started from.
        after: the same with the exported ones.
        pipe: the exported model.
    """

    samples: dict[str, Any]
    before: float
    after: float
    pipe: PaintByExample


def grid_loss(config: Config, model: LatentDiffusion, samples: dict[str, Any]) -> float:
    """Mean loss over the eight samples, the validation's timesteps, and fixed noise; nothing dropped."""
    task = DiffusionTask(config, model.eval())
    batch = encode_batch(model, samples)
    fixed = draw(1, batch.sample_index, (8, 8, 8), task.schedule.timesteps, "overfit")
    losses = []
    with torch.no_grad():
        for timestep in VALIDATION_TIMESTEPS:
            steps = torch.full_like(fixed.timesteps, timestep)
            draws = Draws(steps, fixed.drop, fixed.noise, fixed.image_noise, fixed.masked_noise)
            losses.append(task.losses(batch, draws, torch.zeros(8, dtype=torch.bool))[0].mean())
    return float(torch.stack(losses).mean())


@pytest.fixture(scope="module")
def overfit(shards: Path, autoencoder: str, tmp_path_factory: pytest.TempPathFactory) -> Overfit:
    folder = tmp_path_factory.mktemp("overfit")
    config = tiny_config(shards, folder, autoencoder, f"cache.folder={folder / 'cache'}", *OVERFIT)
    model, config = build_model(config)
    dataset = TrainingData(config).dataset("train")
    items = sorted((dataset[index] for index in range(8)), key=lambda item: item.key)
    samples = collate(items)
    before = grid_loss(config, model, samples)
    result = run(config)
    pipe = PaintByExample.from_pretrained(result.model_dir)
    return Overfit(samples, before, grid_loss(config, pipe.model, samples), pipe)


def picture(overfit: Overfit, name: str, index: int) -> np.ndarray:
    return overfit.samples[name][index].permute(1, 2, 0).numpy()


def paint(overfit: Overfit, scene: int, exemplar: int) -> np.ndarray:
    """Edit the first image of a scene with one of its exemplars, always with the same noise."""
    output = overfit.pipe(
        picture(overfit, "exemplar", 4 * scene + exemplar),
        picture(overfit, "image", 4 * scene),
        picture(overfit, "mask", 4 * scene)[..., 0],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    return output.images[0] * 255.0


def test_the_samples_are_four_objects_in_each_of_two_scenes(overfit: Overfit):
    assert overfit.samples["key"] == [f"{scene}-{number:03d}" for scene in range(2) for number in OBJECTS]
    hole = overfit.samples["mask"] > 0
    assert 0.2 < float(hole.float().mean()) < 0.6
    assert torch.equal(hole, hole[:1].expand_as(hole))
    for scene in overfit.samples["image"].masked_fill(hole, 0).split(4):
        assert torch.equal(scene, scene[:1].expand_as(scene)), (
            "more than the exemplar tells the objects apart"
        )


def test_the_loss_falls_tenfold(overfit: Overfit):
    print(f"\nloss on the fixed grid: {overfit.before:.4f} before, {overfit.after:.4f} after")
    assert overfit.after * FALL < overfit.before


def test_the_exemplar_decides_what_is_painted(overfit: Overfit):
    print()
    for scene in range(2):
        hole = picture(overfit, "mask", 4 * scene)[..., 0] > 0
        edits = [paint(overfit, scene, exemplar) for exemplar in range(4)]
        assert np.array_equal(edits[0], paint(overfit, scene, 0)), "the noise is not fixed"
        truths = [picture(overfit, "image", 4 * scene + exemplar).astype(float) for exemplar in range(4)]

        def apart(first: np.ndarray, second: np.ndarray, hole: np.ndarray = hole) -> float:
            return float(np.abs(first - second)[hole].mean())

        between = [apart(edits[i], edits[j]) for i in range(4) for j in range(i)]
        own = [apart(edits[i], truths[i]) for i in range(4)]
        others = [min(apart(edits[i], truths[j]) for j in range(4) if j != i) for i in range(4)]
        print(
            f"scene {scene}, of 255: between exemplars {np.round(between, 1)}; to the object of the exemplar"
        )
        print(f"  {np.round(own, 1)}, to the nearest other one {np.round(others, 1)}")
        assert min(between) > MARGIN
        assert all(mine < other for mine, other in zip(own, others, strict=True))


def test_outside_the_hole_nothing_changes(overfit: Overfit):
    hole = picture(overfit, "mask", 0)[..., 0] > 0
    edit = paint(overfit, 0, 1)
    assert np.array_equal(edit[~hole].round(), picture(overfit, "image", 0)[~hole])
