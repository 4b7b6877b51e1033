"""Detects NaN and Inf losses and gradients, names step, samples and layer, and stops or skips the step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from pbe.config import TrainerConfig
from pbe.errors import UserError
from pbe.training.optimization.sharding import from_all_ranks, local, whole

LOG = logging.getLogger(__name__)

Recompute = Callable[[Any], object] | None
LISTED = 8  # samples or parameters that a message names


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together, over all shards where they are sharded."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(grads))


def sample_indices(batch: Any) -> list[int]:
    """Return the global indices of a batch's samples, cached or not."""
    index = batch["sample_index"] if isinstance(batch, dict) else batch.sample_index
    return [int(i) for i in index]


def sample_names(batch: Any) -> str:
    """Return the global indices of a batch's samples and, where it has them, their images' names."""
    indices = sample_indices(batch)
    names = batch.get("key") if isinstance(batch, dict) else None
    if names is None:
        return _listed([str(i) for i in indices])
    return _listed([f"{i} '{name}'" for i, name in zip(indices, names, strict=True)])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


@contextmanager
def non_finite_layers(module: nn.Module) -> Iterator[list[str]]:
    """Collect the layers whose output is not finite inside a ``with`` block, in the order of their calls."""
    bad: list[str] = []

    def watcher(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                bad.append(name)

        return watch

    leaves = [(name, child) for name, child in module.named_modules() if not any(child.children())]
    handles = [child.register_forward_hook(watcher(name)) for name, child in leaves]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()


class Guard:
    """Checks every optimizer step before it is made.

    All ranks see the same gradients, but each only its own losses: they exchange their findings, so that all
    of them decide the same.
    """

    def __init__(self, options: TrainerConfig) -> None:
        self.options = options
        self.skipped = 0  # steps in a row
        self._micro_batches: list[tuple[Any, Tensor]] = []

    def observe(self, batch: Any, loss: Tensor) -> None:
        """Remember a micro-batch of the coming step and its loss."""
        self._micro_batches.append((batch, loss.detach()))

    def allows(
        self, norm: Tensor, step: int, module: nn.Module, recompute: Recompute, *, scaled: bool = False
    ) -> bool:
        """Return whether the step may be made, the same on all ranks; the micro-batches are forgotten.

        ``norm`` is of all gradients, ``step`` the optimizer steps made before, ``module`` has the layers and
        parameters that are named. ``recompute`` computes the loss of a batch once more, to find the layer.
        ``scaled``: a gradient scaler skips by itself the steps for which its scale was too large.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        if torch.isfinite(norm):
            self.skipped = 0
            return True
        bad = [(batch, float(loss)) for batch, loss in micro_batches if not torch.isfinite(loss)]
        found = from_all_ranks(bool(bad))
        if scaled and not any(found):
            return True
        if bad:
            text = _bad_loss(*bad[0], step, module, recompute)
        else:
            text = _bad_gradients(micro_batches, step, module)
        messages = from_all_ranks(text)
        message = messages[found.index(True)] if any(found) else messages[0]
        self.skipped += 1
        if self.options.on_nan == "stop" or self.skipped > self.options.max_skipped:
            raise UserError(f"{message}; lower optimizer.learning_rate, or use trainer.precision=32-true")
        rank_zero_only(LOG.warning)("%s; the step is left out", message)
        return False


def _bad_loss(batch: Any, loss: float, step: int, module: nn.Module, recompute: Recompute) -> str:
    where = ""
    if recompute is not None:
        with non_finite_layers(module) as layers:
            recompute(batch)
        where = f"; first in layer {layers[0]}" if layers else "; every layer's output is finite"
    return f"the loss is {loss} at step {step} (samples {sample_names(batch)}{where})"


def _bad_gradients(micro_batches: list[tuple[Any, Tensor]], step: int, module: nn.Module) -> str:
    bad = [
        name
        for name, p in module.named_parameters()
        if p.grad is not None and not torch.isfinite(local(p.grad)).all()
    ]
    names = "; ".join(sample_names(batch) for batch, _ in micro_batches)
    where = f"parameters: {_listed(bad)}" if bad else "in another rank's share of the parameters"
    return f"gradients are not finite at step {step} (samples {names}; {where})"
