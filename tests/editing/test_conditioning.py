"""Noise predictors of an edit: the prepared one gives what the plain one gives."""

from __future__ import annotations

import pytest
import torch

from pbe.diffusion.schedule import make_schedule
from pbe.editing.engine import Conditioning, noise_predictor, prepared_predictor
from pbe.models import LatentDiffusion
from tests.models.tiny import randomised, relative, tiny_model_config


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@torch.no_grad()
def test_prepared_predictor_gives_what_the_plain_one_gives(scale: float, prediction: str) -> None:
    config = tiny_model_config()
    config.prediction = prediction
    model, schedule = randomised(LatentDiffusion(config)), make_schedule(config.schedule)
    latents, masked, keep = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.rand(3, 1, 8, 8)
    conditioning = Conditioning(torch.randn(3, 1, 24), masked, keep)
    timesteps = torch.full((3,), 481)
    expected = noise_predictor(model, schedule, conditioning, scale)(latents, timesteps)
    known = torch.tensor([981, 481, 1])
    actual = prepared_predictor(model, schedule, conditioning, scale, known)(latents, timesteps)
    assert relative(actual, expected) < 5e-5  # guidance multiplies the rounding of both halves


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (1.5, 4)])
@torch.no_grad()
def test_scale_one_costs_one_half(scale: float, rows: int) -> None:
    model = randomised(LatentDiffusion(tiny_model_config()))
    seen = []
    model.unet.mid1.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    conditioning = Conditioning(torch.randn(2, 1, 24), torch.randn(2, 4, 8, 8), torch.ones(2, 1, 8, 8))
    schedule = make_schedule(model.config.schedule)
    predict = prepared_predictor(model, schedule, conditioning, scale, torch.tensor([7]))
    assert predict(torch.randn(2, 4, 8, 8), torch.tensor([7, 7])).shape == (2, 4, 8, 8)
    assert seen == [rows]
