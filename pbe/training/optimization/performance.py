"""What trades memory for time or makes the same arithmetic faster, as configuration values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pbe.config import TrainerConfig
from pbe.models import LatentDiffusion
from pbe.models.attention import SpatialTransformer
from pbe.models.layers import ResBlock


def make_fast(model: LatentDiffusion, options: TrainerConfig) -> None:
    """Apply ``gradient_checkpointing``, ``channels_last`` and ``compile``; names and weights stay.

    Args:
        model: changed in place.
        options: of the run.
    """
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if options.gradient_checkpointing:
        checkpoint_blocks(model)
    if options.compile:
        model.unet.compile()
        model.autoencoder.encoder.compile()


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only the inputs of residual and transformer blocks, and compute the rest again going back.

    Chen et al. 2016. The gradients are those of training without it.
    """
    for module in model.modules():
        if isinstance(module, ResBlock | SpatialTransformer):
            module.forward = _again(module.forward)  # type: ignore[method-assign]


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return checkpointed
