"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pbe.training.optimization.sharding import cut_like, is_sharded, local, on_the_cpu


class Ema:
    """Average of every trainable parameter of a module, in float32 beside the module.

    The decay warms up as ``min(decay, (1 + step) / (10 + step))``, so that the random start is
    forgotten early.

    Args:
        module: its parameters that require gradients are averaged.
        decay: in [0, 1); 0 keeps the average equal to the weights.
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
