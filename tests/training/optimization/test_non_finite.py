"""Losses and gradients that are not finite: their origin is named; the step is skipped or the run ends."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pbe.config import TrainerConfig
from pbe.errors import UserError
from pbe.training.optimization.non_finite import Guard, gradient_norm, non_finite_layers, sample_names
from pbe.training.tasks.diffusion import DiffusionTask
from tests.training.tiny import checkpoint, differing, logged, run, tiny_config


def breaking(monkeypatch: pytest.MonkeyPatch, step: int, spoil: Callable[[DiffusionTask], None]) -> None:
    """Spoil what a step computes."""
    original = DiffusionTask.batch_loss

    def broken(self: DiffusionTask, batch: object) -> torch.Tensor:
        loss = original(self, batch)
        return loss * float("nan") if self.global_step == step and spoil is nan_loss else loss

    monkeypatch.setattr(DiffusionTask, "batch_loss", broken)
    if spoil is nan_loss:
        return
    forward = DiffusionTask.losses

    def spoilt(self: DiffusionTask, *args: object) -> object:
        module = self.model.unet.mid2.conv1
        hook = None
        if self.global_step == step:
            hook = module.register_forward_pre_hook(lambda _, given: (given[0] * float("inf"),))
        try:
            return forward(self, *args)
        finally:
            if hook is not None:
                hook.remove()

    monkeypatch.setattr(DiffusionTask, "losses", spoilt)


def nan_loss(task: DiffusionTask) -> None:
    """Stand for a loss that is broken after every layer."""


def bad_layer(task: DiffusionTask) -> None:
    """Stand for a layer that gives infinities."""


def test_stop_names_step_samples_and_layer(shards, autoencoder, tmp_path, monkeypatch):
    breaking(monkeypatch, 2, bad_layer)
    config = tiny_config(shards, tmp_path, autoencoder, "trainer.max_steps=4", "trainer.checkpoint_every=1")
    with pytest.raises(UserError) as caught:
        run(config)
    text = str(caught.value)
    assert text.startswith("the loss is nan at step 2 (samples 4 '")
    assert ", 5 '" in text
    assert "first in layer unet.mid2.conv1" in text
    assert "lower optimizer.learning_rate" in text
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_skip_leaves_the_step_out_and_says_so(shards, autoencoder, tmp_path, monkeypatch, caplog):
    breaking(monkeypatch, 2, nan_loss)
    settings = [
        autoencoder,
        "trainer.on_nan=skip",
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=-1",
    ]
    with caplog.at_level(logging.WARNING, "pbe"):
        assert run(tiny_config(shards, tmp_path, *settings, "trainer.max_steps=4")).steps == 4
    (told,) = caplog.messages
    assert told.startswith("the loss is nan at step 2 (samples 4 ")
    assert told.endswith("every layer's output is finite); the step is left out")
    states = [
        torch.load(tmp_path / "checkpoints" / f"step={step:07d}.ckpt", weights_only=False)
        for step in (2, 3, 4)
    ]
    for kind in ("state_dict", "ema"):
        assert differing(states[0][kind], states[1][kind]) == [], "neither weights nor average move"
        assert differing(states[1][kind], states[2][kind]) != []
    losses = {step: value for step, name, value in logged(tmp_path, "train/loss") if name == "train/loss"}
    assert "nan" not in losses.values()


def test_too_many_skipped_steps_end_the_run():
    guard = Guard(TrainerConfig(on_nan="skip", max_skipped=2))
    batch = {"sample_index": torch.tensor([7]), "key": ["cat"]}
    nan = torch.tensor(float("nan"))

    def allows(norm: torch.Tensor, loss: torch.Tensor) -> bool:
        guard.observe(batch, loss)
        return guard.allows(norm, 5, nn.Linear(1, 1), lambda _: None)

    assert not allows(nan, nan)
    assert not allows(nan, nan)
    assert allows(torch.ones(()), torch.ones(())), "a good step starts the count anew"
    assert [allows(nan, nan) for _ in range(2)] == [False, False]
    with pytest.raises(UserError, match=r"the loss is nan at step 5 \(samples 7 'cat'"):
        allows(nan, nan)


def test_gradients_without_a_bad_loss_name_their_parameters():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert float(gradient_norm(module.parameters())) == pytest.approx(12**0.5)
    module[1].weight.grad[0, 0] = float("inf")
    batch = {"sample_index": torch.tensor([1, 2])}
    for scaled in (True, False):
        guard = Guard(TrainerConfig())
        guard.observe(batch, torch.ones(()))
        if scaled:  # the scaler tries scales that are too large, and skips by itself
            norm = gradient_norm(module.parameters())
            assert guard.allows(norm, 3, module, lambda _: None, scaled=True)
            continue
        with pytest.raises(UserError, match=r"not finite at step 3 \(samples 1, 2; parameters: 1.weight\)"):
            guard.allows(gradient_norm(module.parameters()), 3, module, lambda _: None)


def test_no_more_than_a_few_samples_are_listed():
    assert sample_names({"sample_index": torch.arange(11)}) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


def test_hooks_are_taken_off_again():
    module = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with non_finite_layers(module) as bad:
        module(torch.tensor([[float("nan")]]))
    assert bad == ["0", "1"]
    module(torch.tensor([[float("nan")]]))
    assert bad == ["0", "1"]


def test_speed_and_memory_are_logged(shards, autoencoder, tmp_path):
    run(tiny_config(shards, tmp_path, autoencoder, "trainer.max_steps=4", "logging.every=2"))
    rows = {(step, name): float(value) for step, name, value in logged(tmp_path, "system/")}
    names = ("samples_per_second", "data_wait_share", "memory_gb", "hours_left")
    assert rows.keys() == {(step, f"system/{name}") for step in (2, 4) for name in names}
    assert rows[4, "system/samples_per_second"] > 0
    assert 0 < rows[4, "system/data_wait_share"] < 1
    assert 0.05 < rows[4, "system/memory_gb"] < 100
    assert rows[2, "system/hours_left"] > rows[4, "system/hours_left"] == 0
