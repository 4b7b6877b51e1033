"""The types that weights may have, by the names that command lines give them. Nothing imports torch early."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def torch_dtype(name: str) -> torch.dtype:
    """Return the type that a name of :data:`DTYPES` stands for."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype
