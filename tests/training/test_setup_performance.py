"""Switches for speed and memory change neither names nor, but for rounding, numbers."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

import pbe.training.activations as module
from pbe.config import Config, OptimizerConfig, TrainerConfig, load_config
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.training.optimization.optimizer import make_optimizer
from pbe.training.setup import apply_performance_options
from tests.training.tasks.test_diffusion import awaken, config_of, encoded
from tests.training.tiny import checkpoint, run, tiny_config


def gradients(options: TrainerConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = LatentDiffusion(config_of().model)
    awaken(model)
    apply_performance_options(model, options)
    batch = encoded(model, 2)
    condition = model.exemplar_encoder.condition(batch.features)
    noise = torch.randn(batch.image.mean.shape, generator=torch.Generator().manual_seed(1))
    output = model.predict(noise, torch.tensor([5, 700]), condition, batch.masked.mean, batch.keep_mask)
    (output**2).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "channels_last"])
def test_gradients_are_those_of_plain_training(switch: str):
    plain, fast = gradients(TrainerConfig()), gradients(TrainerConfig(**{switch: True}))
    assert plain.keys() == fast.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointing_computes_blocks_twice_and_only_when_training(monkeypatch):
    calls: list[int] = []
    original = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    gradients(TrainerConfig(gradient_checkpointing=True))
    blocks = len(calls)
    assert blocks == 2 + 2 + 4 + 4  # residual blocks down, mid and up, and transformers
    model = LatentDiffusion(config_of().model)
    names = list(model.state_dict())
    apply_performance_options(model, TrainerConfig(gradient_checkpointing=True))
    assert list(model.state_dict()) == names
    with torch.no_grad():
        model.autoencoder.encode(torch.zeros(1, 3, 32, 32))
    assert len(calls) == blocks


def test_compile_is_asked_for(monkeypatch):
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    model = LatentDiffusion(config_of().model)
    apply_performance_options(model, TrainerConfig())
    assert compiled == []
    apply_performance_options(model, TrainerConfig(compile=True))
    assert compiled == [model.unet, model.autoencoder.encoder]


def test_the_fused_optimizer_makes_the_same_steps():
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        optimizer, _ = make_optimizer(layer, OptimizerConfig(learning_rate=0.1), 10)
        for group in optimizer.param_groups:
            assert group["fused"]  # on the CPU without being asked for
            group["fused"] = fused
        for _ in range(3):
            layer(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        results.append(layer.weight.detach().clone())
    torch.testing.assert_close(results[0], results[1])


def test_gradients_are_clipped_beside_the_fused_optimizer():
    layer = nn.Linear(4, 4)
    optimizer, _ = make_optimizer(layer, OptimizerConfig(), 10)
    layer(torch.full((1, 4), 1e3)).sum().backward()
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 1.0)
    assert float(torch.nn.utils.get_total_norm(p.grad for p in layer.parameters())) <= 1.0 + 1e-5


def test_fused_half_precision_with_clipping_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("optimizer: {fused: true}\ntrainer: {precision: 16-mixed}\n")
    with pytest.raises(UserError, match="cannot clip gradients; set optimizer"):
        load_config(path)
    assert isinstance(load_config(path, ["optimizer.gradient_clip=0"]), Config)


def test_all_switches_together_train(finished, shards, autoencoder, tmp_path):
    settings = ["trainer.gradient_checkpointing=true", "trainer.channels_last=true", "optimizer.fused=true"]
    assert run(tiny_config(shards, tmp_path, autoencoder, *settings)).steps == 3
    fast, plain = (checkpoint(folder)["ema"] for folder in (tmp_path, finished))
    assert fast.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-2, atol=1e-4, msg=name)
