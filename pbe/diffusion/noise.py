"""Standard normal noise, drawn on the CPU so that a seed means the same on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(shape: Sequence[int], generator: Generators = None) -> Tensor:
    """Draw standard normal noise, float32 on the CPU.

    Args:
        shape: ``(b, ...)``.
        generator: one CPU generator for all of it; or one for each sample of the batch, so that a sample
            gets the same noise whatever it shares a batch with; None draws from torch's own state.

    Raises:
        ValueError: another number of generators than samples.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
    return torch.cat([torch.randn((1, *shape[1:]), generator=each) for each in generator])
