"""Watches for numbers that are none: which step, which samples, which layer; then stops or skips."""

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
from pbe.training.optimization.sharding import local, whole
from pbe.training.running_means import told_by_all

LOG = logging.getLogger(__name__)

Again = Callable[[Any], object] | None
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
    """Return the global indices of a batch's samples and, where it has them, their pictures' names."""
    indices = sample_indices(batch)
    names = batch.get("key") if isinstance(batch, dict) else None
    if names is None:
        return _listed([str(i) for i in indices])
    return _listed([f"{i} '{name}'" for i, name in zip(indices, names, strict=True)])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


@contextmanager
def first_bad_output(module: nn.Module) -> Iterator[list[str]]:
    """Note, inside a ``with`` block, the layers whose output is not finite, the first one first."""
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


@rank_zero_only
def warn(message: str) -> None:
    """Warn in one line, once for all ranks."""
    LOG.warning("%s", message)


class Guard:
    """Looks at every optimizer step before it is made.

    All ranks see the same gradients, but each only its own losses: what these were they tell each other, so
    that all of them decide the same.

    Args:
        options: ``on_nan`` (``stop`` or ``skip``) and ``max_skipped`` steps in a row.

    Attributes:
        skipped: steps in a row that were left out.
    """

    def __init__(self, options: TrainerConfig) -> None:
        self.options = options
        self.skipped = 0
        self._micro: list[tuple[Any, Tensor]] = []

    def observe(self, batch: Any, loss: Tensor) -> None:
        """Remember a micro-batch of the coming step and its loss."""
        self._micro.append((batch, loss.detach()))

    def allows(
        self, norm: Tensor, step: int, module: nn.Module, again: Again, *, scaled: bool = False
    ) -> bool:
        """Say whether the step may be made, the same on all ranks; the micro-batches are forgotten.

        Args:
            norm: of all gradients.
            step: optimizer steps made before.
            module: whose layers and parameters are named.
            again: computes the loss of a batch once more, to find the layer; None where that cannot be.
            scaled: a gradient scaler leaves out by itself the steps for which its scale was too large.

        Raises:
            UserError: the numbers are none and ``on_nan`` is ``stop``, or too many steps were skipped.
        """
        micro, self._micro = self._micro, []
        if torch.isfinite(norm):
            self.skipped = 0
            return True
        faulty = [(batch, float(loss)) for batch, loss in micro if not torch.isfinite(loss)]
        found = told_by_all(bool(faulty))
        if scaled and not any(found):
            return True  # the gradient scaler is looking for its scale, and leaves the step out by itself
        messages = told_by_all(self._describe(faulty, micro, step, module, again))
        message = next((text for text, bad in zip(messages, found, strict=True) if bad), messages[0])
        self.skipped += 1
        if self.options.on_nan == "stop" or self.skipped > self.options.max_skipped:
            raise UserError(f"{message}; lower optimizer.learning_rate, or use trainer.precision=32-true")
        warn(f"{message}; the step is left out")
        return False

    def _describe(
        self,
        faulty: list[tuple[Any, float]],
        micro: list[tuple[Any, Tensor]],
        step: int,
        module: nn.Module,
        again: Again,
    ) -> str:
        if not faulty:
            bad = [
                name
                for name, p in module.named_parameters()
                if p.grad is not None and not torch.isfinite(local(p.grad)).all()
            ]
            names = "; ".join(sample_names(batch) for batch, _ in micro)
            where = f"parameters: {_listed(bad)}" if bad else "in another rank's share of the parameters"
            return f"gradients are not finite at step {step} (samples {names}; {where})"
        batch, loss = faulty[0]
        if again is None:
            return f"the loss is {loss} at step {step} (samples {sample_names(batch)})"
        with first_bad_output(module) as layers:
            again(batch)
        where = f"first in layer {layers[0]}" if layers else "every layer's output is finite"
        return f"the loss is {loss} at step {step} (samples {sample_names(batch)}; {where})"
