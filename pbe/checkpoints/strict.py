"""Strict comparison of what a file holds with what the model wants."""

from __future__ import annotations

import torch

from pbe.checkpoints.tensors import Lazies, LazyTensor, cast, lazy
from pbe.errors import UserError

LISTED = 10
Shapes = dict[str, tuple[int, ...]]


def shapes(tensors: Lazies) -> Shapes:
    """Return the shape of every tensor."""
    return {key: tensor.shape for key, tensor in tensors.items()}


def check_shapes(found: Shapes, expected: Shapes, source: str, hint: str = "") -> None:
    """Compare keys and shapes.

    Args:
        found: what there is.
        expected: what the model wants.
        source: named in the error.
        hint: what the file looks like, said at the end of the error.

    Raises:
        UserError: lists missing, unexpected and misshapen keys, the first ten of each and their number.
    """
    both = sorted(expected.keys() & found.keys())
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [key for key in both if found[key] != expected[key]],
    }
    lines = [
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
    """Refuse a tensor with NaN or infinity in it.

    Raises:
        UserError: names the tensor.
    """
    if value.is_floating_point() and value.numel():
        low, high = torch.aminmax(value)  # NaN spreads to both
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise UserError(
                f"{source}: '{key}' holds NaN or infinity: the weights are broken; take another copy"
            )


def checked(key: str, tensor: LazyTensor, dtype: torch.dtype | None, source: str) -> torch.Tensor:
    """Read a tensor, check that its numbers are finite, and return it as ``dtype`` (None: as it is).

    Raises:
        UserError: NaN or infinity in it, or numbers too large for ``dtype``.
    """
    value = tensor.read()
    check_finite(key, value, source)
    result = cast(lazy(value), dtype).read()
    if result.dtype == torch.float16 and value.dtype != torch.float16 and not bool(result.isfinite().all()):
        raise UserError(f"{source}: '{key}' holds numbers too large for half precision; use bf16 or fp32")
    return result
