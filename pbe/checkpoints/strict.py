"""Strict comparison of what a file holds with what the model wants."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pbe.checkpoints.tensors import Lazies, LazyTensor, cast, lazy
from pbe.errors import UserError

LISTED = 10
# What a tensor of a model may be made of: weights of floating-point numbers, counters of whole ones.
NUMBERS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def shapes(tensors: Lazies) -> Shapes:
    """Return the shape of every tensor."""
    return {key: tensor.shape for key, tensor in tensors.items()}


def check_shapes(
    found: Shapes, expected: Shapes, source: str, hint: str = "", parts: Mapping[str, str] | None = None
) -> None:
    """Compare keys and shapes.

    Args:
        found: what there is.
        expected: what the model wants.
        source: named in the error.
        hint: what the file looks like, said at the end of the error.
        parts: names of networks by the prefix of their keys, to be told that a whole one is missing.
    """
    absent = {
        prefix: name
        for prefix, name in (parts or {}).items()
        if not any(key.startswith(prefix) for key in found)
    }
    both = sorted(expected.keys() & found.keys())
    missing = [key for key in sorted(expected.keys() - found.keys()) if not key.startswith(tuple(absent))]
    problems = {
        "missing": missing,
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [key for key in both if found[key] != expected[key]],
    }
    lines = [
        f"no {name} (all {sum(key.startswith(prefix) for key in expected)} tensors of {prefix}*)"
        for prefix, name in absent.items()
    ]
    if absent and not any(problems.values()):
        hint = "Take a file that holds the whole model"
    lines += [
        f"{len(keys)} {kind}: {', '.join(keys[:LISTED])}{', ...' if len(keys) > LISTED else ''}"
        for kind, keys in problems.items()
        if keys
    ]
    if len(problems["misshapen"]) == 1:
        (key,) = problems["misshapen"]
        lines[-1] += f" (has {list(found[key])}, not {list(expected[key])})"
    if lines:
        raise UserError(f"{source} does not fit the model: {'; '.join(lines)}{f'. {hint}' if hint else ''}")


def check_finite(key: str, value: torch.Tensor, source: str) -> None:
    """Refuse a tensor with NaN or infinity in it, and one of a kind in which no weights come."""
    if value.dtype not in NUMBERS or value.layout != torch.strided or value.is_meta:
        kind = f"{value.dtype}, {value.layout}, {value.device}".replace("torch.", "")
        raise UserError(
            f"{source}: '{key}' is a tensor of a kind that is not supported ({kind}); take the fp16 file"
        )
    if value.is_floating_point() and value.numel():
        low, high = torch.aminmax(value)  # NaN spreads to both
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise UserError(
                f"{source}: '{key}' holds NaN or infinity: the weights are broken; take another copy"
            )


def checked(key: str, tensor: LazyTensor, dtype: torch.dtype | None, source: str) -> torch.Tensor:
    """Read a tensor, check that its numbers are finite, and return it as ``dtype`` (None: as it is)."""
    value = tensor.read()
    check_finite(key, value, source)
    result = cast(lazy(value), dtype).read()
    if result.dtype == torch.float16 and value.dtype != torch.float16 and not bool(result.isfinite().all()):
        raise UserError(f"{source}: '{key}' holds numbers too large for half precision; use bf16 or fp32")
    return result
