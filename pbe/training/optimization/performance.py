"""Options that trade memory for time or do the same arithmetic faster, and Lightning's precisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch import nn
from torch.utils.checkpoint import checkpoint

from pbe.config import TrainerConfig
from pbe.models import LatentDiffusion
from pbe.models.attention import SpatialTransformer
from pbe.models.layers import ResBlock


def apply_performance_options(model: LatentDiffusion, options: TrainerConfig) -> None:
    """Apply ``gradient_checkpointing``, ``channels_last`` and ``compile`` in place; weights stay."""
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if options.gradient_checkpointing:
        checkpoint_blocks(model)
    if options.compile:
        model.unet.compile()
        model.autoencoder.encoder.compile()


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only the inputs of residual and transformer blocks and recompute the rest in the backward pass.

    Chen et al. 2016. The gradients are those of training without it.
    """
    for module in model.modules():
        if isinstance(module, ResBlock | SpatialTransformer):
            module.forward = _checkpointed(module.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return recomputed


class PureBfloat16(HalfPrecision):
    """All weights in bfloat16, frozen ones included; the networks' inputs are converted where they are used.

    Latents, noise, targets and losses stay float32: Lightning would convert the batch, which is uint8 or a
    frozen dataclass, and everything that is made in a step.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Leave torch's default type as it is."""
        yield

    def convert_input(self, data: Any) -> Any:
        """Leave a batch as it is."""
        return data


def precision_plugin(options: TrainerConfig, *, cpu: bool) -> Precision | None:
    """Return the plugin of ``trainer.precision``, or None where Lightning's own is right.

    On the CPU Lightning would take bf16-mixed in place of 16-mixed.
    """
    if options.precision == "bf16-true":
        return PureBfloat16()
    if options.precision == "16-mixed" and cpu:
        return MixedPrecision("16-mixed", "cpu")
    return None
