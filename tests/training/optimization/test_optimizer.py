"""Decay groups and the learning-rate schedule."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pbe.config import OptimizerConfig, load_config
from pbe.errors import UserError
from pbe.training.optimization.optimizer import learning_rate_factor, make_optimizer, parameter_groups


class Small(nn.Module):
    """A matrix, a kernel, norms, biases, a null condition, and something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.conv = nn.Conv2d(2, 2, 3)
        self.norm = nn.LayerNorm(4)
        self.null_condition = nn.Parameter(torch.randn(1, 1, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def named_groups(module: nn.Module, config: OptimizerConfig) -> list[tuple[float, set[str]]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module.named_parameters(), config)
    return [(group["weight_decay"], {names[id(p)] for p in group["params"]}) for group in groups]


def test_vectors_and_the_null_condition_do_not_decay():
    assert named_groups(Small(), OptimizerConfig(weight_decay=0.03)) == [
        (0.03, {"linear.weight", "conv.weight"}),
        (0.0, {"linear.bias", "conv.bias", "norm.weight", "norm.bias", "null_condition"}),
    ]


def test_without_decay_groups_everything_decays():
    every = {name for name, p in Small().named_parameters() if p.requires_grad}
    assert named_groups(Small(), OptimizerConfig(weight_decay=0.03, decay_groups=False)) == [(0.03, every)]


def test_no_decay_group_is_left_empty():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False).named_parameters(), OptimizerConfig())) == 1


def test_warm_up_has_the_values_of_the_original(project_root):
    config = load_config(project_root / "configs/paper.yaml").optimizer
    factor = learning_rate_factor(config, 1_000_000)
    expected = {0: 1e-6, 1: 1e-6 + 0.999999e-4, 2500: 0.25000075, 5000: 0.5000005, 10_000: 1.0, 700_000: 1.0}
    for step, value in expected.items():
        assert factor(step) == pytest.approx(value, rel=1e-12)
    steps = [factor(step) for step in range(10_000)]
    increments = {round(b - a, 12) for a, b in itertools.pairwise(steps)}
    assert increments == {round(0.999999e-4, 12)}


def test_constant_rate_cools_down_over_the_last_steps():
    factor = learning_rate_factor(OptimizerConfig(warmup_steps=10, cooldown_steps=20), 100)
    assert [factor(step) for step in (10, 50, 80)] == [1.0, 1.0, 1.0]
    short = learning_rate_factor(OptimizerConfig(warmup_steps=0, cooldown_steps=500), 100)
    assert [short(step) for step in (0, 50, 100)] == [1.0, 0.5, 0.0]
    assert [factor(step) for step in (85, 90, 99, 100, 120)] == pytest.approx([0.75, 0.5, 0.05, 0.0, 0.0])


def test_cosine_goes_from_one_to_zero_after_the_warm_up():
    factor = learning_rate_factor(OptimizerConfig(warmup_steps=100, decay="cosine"), 1100)
    assert factor(100) == 1.0
    assert factor(600) == pytest.approx(0.5)
    assert factor(350) == pytest.approx(0.5 + 0.5**1.5)
    assert factor(1100) == 0.0
    assert factor(5000) == 0.0


def test_no_warm_up_starts_at_the_full_rate():
    assert learning_rate_factor(OptimizerConfig(warmup_steps=0), 10)(0) == 1.0


def test_the_optimizer_has_the_papers_settings(project_root):
    config = load_config(project_root / "configs/paper.yaml").optimizer
    optimizer, scheduler = make_optimizer(Small(), config, 1_000_000)
    assert len(optimizer.param_groups) == 1
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.01)
    # the first step is made at 1e-6 of the rate, the next one a ten-thousandth higher
    assert group["lr"] == pytest.approx(1e-5 * 1e-6)
    optimizer.step()
    scheduler.step()
    assert group["lr"] == pytest.approx(1e-5 * (1e-6 + 0.999999e-4))
    assert config.ema_decay == 0.0
    assert config.gradient_clip == 0.0


def test_muon_moves_matrices_along_orthogonal_ones_and_vectors_by_nadamw():
    torch.manual_seed(0)
    module, rate = nn.ModuleList([nn.Linear(12, 6), nn.Conv2d(3, 8, 3)]), 0.01
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    config = OptimizerConfig(name="muon", learning_rate=rate, warmup_steps=0, weight_decay=0.0)
    optimizer, _ = make_optimizer(module, config, 10)
    optimizer.step()
    for name, parameter in module.named_parameters():
        moved = (before[name] - parameter.detach()).flatten(1) if parameter.ndim > 1 else None
        if moved is None:
            assert set(optimizer.state[parameter]) >= {"exp_avg", "exp_avg_sq"}
            continue
        assert set(optimizer.state[parameter]) == {"use_muon", "momentum_buffer"}
        assert parameter.grad is not None
        u, _, v = torch.linalg.svd(parameter.grad.flatten(1), full_matrices=False)
        nearest = u @ v * (rate * 0.2 * max(moved.shape) ** 0.5)  # AdamW's updates have a mean square of 0.2²
        # five Newton-Schulz steps bring every singular value to between 0.7 and 1.2
        assert torch.nn.functional.cosine_similarity(moved.flatten(), nearest.flatten(), dim=0) > 0.97
        values = torch.linalg.svdvals(moved) / (rate * 0.2 * max(moved.shape) ** 0.5)
        assert 0.6 < values.min() <= values.max() < 1.25


def test_muon_has_no_fused_form(project_root):
    with pytest.raises(UserError, match=r"'optimizer\.fused' is for adamw"):
        load_config(project_root / "configs/toy.yaml", ["optimizer.name=muon", "optimizer.fused=true"])
