"""AdamW or Muon, decay groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from timm.optim.muon import Muon
from torch import nn

from pbe.config import OptimizerConfig

PAPER_WARMUP_START = 1e-6


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[dict[str, object]]:
    """Split trainable parameters into those with and without weight decay.

    With ``decay_groups`` matrices and kernels decay, and vectors (norms, biases) and the null
    condition do not; without it everything decays, as in the original.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        exempt = config.decay_groups and (parameter.ndim < 2 or name.endswith("null_condition"))
        (plain if exempt else decayed).append(parameter)
    groups: list[dict[str, object]] = [{"params": decayed, "weight_decay": config.weight_decay}]
    return [*groups, {"params": plain, "weight_decay": 0.0}] if plain else groups


def learning_rate_factor(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the optimizer step.

    Linear warm-up from 1e-6 to 1 over ``warmup_steps`` (the original's), then constant, or a half
    cosine that reaches zero at ``max_steps``. A constant rate falls linearly to zero over the last
    ``cooldown_steps``, or over the whole of a shorter run.
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return PAPER_WARMUP_START + (1.0 - PAPER_WARMUP_START) * step / config.warmup_steps
        if config.decay == "constant":
            last = min(config.cooldown_steps, max_steps)
            return min(max(max_steps - step, 0) / last, 1.0) if last else 1.0
        share = (step - config.warmup_steps) / max(max_steps - config.warmup_steps, 1)
        return 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))

    return factor


def make_optimizer(
    module: nn.Module, config: OptimizerConfig, max_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Build the optimizer of the module's trainable parameters and its per-step schedule.

    Muon (Jordan et al. 2024) takes the nearest orthogonal matrix of each matrix's momentum, scaled to the
    size of AdamW's updates (Liu et al. 2025); a kernel is a matrix of outputs by all its inputs.
    """
    groups = parameter_groups(module.named_parameters(), config)
    betas = (config.betas[0], config.betas[1])
    optimizer: torch.optim.Optimizer
    if config.name == "muon":
        optimizer = Muon(
            groups,
            lr=config.learning_rate,
            nesterov=True,
            ns_coefficients="original",
            betas=betas,
            eps=config.eps,
        )
    else:
        optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=config.fused or None
        )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config, max_steps))
    return optimizer, scheduler
