"""Fixtures of the evaluation tests: the toy world, a few cases, the scoring tower and a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pbe.config import AutoencoderConfig, ExemplarEncoderConfig, ModelConfig, UNetConfig
from pbe.data.toy.scenes import ToyWorld
from pbe.editing.pipeline import PaintByExample
from pbe.evaluation.benchmark.toy import ToyCase, export_toy_benchmark, make_benchmark
from pbe.evaluation.metrics.towers import Tower, load_tower
from pbe.models import LatentDiffusion

SIZE, EXEMPLAR = 32, 48


@pytest.fixture(scope="session")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.fixture(scope="session")
def cases(world: ToyWorld) -> list[ToyCase]:
    return make_benchmark(world, seed=3, image_size=SIZE, exemplar_size=EXEMPLAR, objects=6)


@pytest.fixture(scope="session")
def bench_files(world: ToyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of seven cases as a folder; not to be changed."""
    folder = tmp_path_factory.mktemp("bench") / "toy"
    export_toy_benchmark(world, folder, image_size=SIZE, exemplar_size=EXEMPLAR, objects=7)
    return folder


@pytest.fixture(scope="session")
def features() -> Tower:
    return load_tower("lite2", None, None)


@pytest.fixture(scope="session")
def pipe() -> PaintByExample:
    """A model with random weights whose output does depend on the exemplar."""
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=SIZE,
        unet=UNetConfig(
            model_channels=16,
            channel_mult=[1],
            num_res_blocks=1,
            attention_factors=[1],
            num_heads=2,
            context_dim=16,
            norm_groups=8,
        ),
        autoencoder=AutoencoderConfig(
            channels=8, channel_mult=[1, 2, 2], num_res_blocks=1, norm_groups=4, scale_factor=1.0
        ),
        exemplar_encoder=ExemplarEncoderConfig(
            tower="timm/test_efficientnet", image_size=EXEMPLAR, mapper_width=16, mapper_layers=1
        ),
    )
    model = LatentDiffusion(config).eval().requires_grad_(False)
    for parameter in model.unet.parameters():
        if not parameter.any():  # the zero-initialised layers would hide the condition
            torch.nn.init.normal_(parameter, std=0.1)
    return PaintByExample(model)
