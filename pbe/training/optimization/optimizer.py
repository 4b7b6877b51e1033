"""AdamW or Muon, decay groups, the learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from timm.optim.muon import Muon
from torch import Tensor, nn

from pbe.config import OptimizerConfig
from pbe.training.optimization.sharding import cut_like, is_sharded, local, on_the_cpu

PAPER_WARMUP_START = 1e-6


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[dict[str, object]]:
    """Split trainable parameters into those with and without weight decay.

    With ``decay_groups`` matrices and kernels decay, and vectors (norms, biases) and the null
    condition do not; without it everything decays, as in the original.
    """
    decayed, plain = list[nn.Parameter](), list[nn.Parameter]()
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
        rate, eps = config.learning_rate, config.eps
        optimizer = Muon(groups, lr=rate, nesterov=True, ns_coefficients="original", betas=betas, eps=eps)
    else:
        optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=_fused(module, config) or None
        )
        # Lightning unscales and clips before the step; beside a step that unscales it clips nothing
        optimizer._step_supports_amp_scaling = False
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config, max_steps))
    return optimizer, scheduler


def _fused(module: nn.Module, config: OptimizerConfig) -> bool:
    """Return whether one kernel updates a weight: on a CPU always, unless the weights are sharded."""
    weights = list(module.parameters())
    return config.fused or (all(p.device.type == "cpu" for p in weights) and not is_sharded(weights))


class Ema:
    """Average of every trainable parameter of a module, in float32 beside the module.

    The decay, in [0, 1), warms up as ``min(decay, (1 + step) / (10 + step))``, so that the random start is
    forgotten early; 0 keeps the average equal to the weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.begin(module)

    def begin(self, module: nn.Module) -> None:
        """Start the average anew from a module's weights as they lie now, shards where they are sharded."""
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimizer step ``step`` (counted from 1)."""
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        averages = [local(self.average[name]) for name in self.parameters]
        weights = [local(p.detach()).to(a) for p, a in zip(self.parameters.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the module for the length of a ``with`` block."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            local(parameter).copy_(local(values[name]))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name, put together where they are sharded; all ranks have to call it."""
        return on_the_cpu(self.average) if is_sharded(self.average.values()) else dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the averages; every trainable parameter must be there."""
        for name, average in self.average.items():
            local(average).copy_(local(cut_like(state[name], average)))

    def to_parameter_devices(self) -> None:
        """Move each average to the device of its parameter (the module may have moved since)."""
        self.average = {name: self.average[name].to(p.device) for name, p in self.parameters.items()}
