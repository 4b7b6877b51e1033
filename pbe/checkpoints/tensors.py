"""Tensors that stay in their file until they are read: shape and type are known, the numbers are not."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names of options
SMALL = 1 << 16  # bytes; below this a copy costs less than a mapping of its own


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor to be: ``read`` makes it, anew at every call.

    Tensors of a file are mapped, copy on write, so that reading one costs no memory until its numbers
    are used, and changing one never changes the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * self.dtype.itemsize


Lazies = dict[str, LazyTensor]


def lazy(tensor: Tensor) -> LazyTensor:
    """Wrap a tensor that is in memory already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def lazies(state: dict[str, Tensor]) -> Lazies:
    """Wrap a state dict that is in memory already."""
    return {key: lazy(value.detach()) for key, value in state.items()}


def cast(source: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    """Return ``source`` as ``dtype`` when it is of a floating type; None leaves it alone."""
    if dtype is None or not source.dtype.is_floating_point or source.dtype == dtype:
        return source
    return LazyTensor(source.shape, dtype, lambda: source.read().to(dtype))


def whole(source: LazyTensor) -> LazyTensor:
    """Return floating-point numbers that stand for whole ones as int64."""
    if not source.dtype.is_floating_point:
        return source
    return LazyTensor(source.shape, torch.int64, lambda: source.read().float().nan_to_num().round().long())


def widened(source: LazyTensor) -> LazyTensor:
    """Return a tensor of 8-bit floats as float16, which holds each of their numbers exactly; others as is."""
    return cast(source, torch.float16) if source.dtype.itemsize == 1 else source


def reshaped(source: LazyTensor, shape: Sequence[int]) -> LazyTensor:
    """Return ``source`` in another shape of as many elements."""
    return LazyTensor(tuple(shape), source.dtype, lambda: source.read().reshape(tuple(shape)))


def split_heads(source: LazyTensor, heads: int) -> list[LazyTensor]:
    """Take a fused projection apart: rows ``(heads, [q | k | v], d)`` become those of q, of k and of v."""
    rows, rest = source.shape[0] // 3, source.shape[1:]

    def part(index: int) -> Tensor:
        return source.read().reshape(heads, 3, -1, *rest)[:, index].reshape(rows, *rest)

    return [LazyTensor((rows, *rest), source.dtype, partial(part, index)) for index in range(3)]


def fuse_heads(parts: Sequence[LazyTensor], heads: int) -> LazyTensor:
    """Undo :func:`split_heads`."""
    rows, rest = parts[0].shape[0], parts[0].shape[1:]

    def fused() -> Tensor:
        values = [part.read().reshape(heads, 1, -1, *rest) for part in parts]
        return torch.cat(values, dim=1).reshape(3 * rows, *rest)

    return LazyTensor((3 * rows, *rest), parts[0].dtype, fused)


class WeightFile:
    """A file whose tensors are mapped one by one, so that what is not asked for is never touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self.size = os.fstat(self._file.fileno()).st_size

    def bytes_at(self, offset: int, length: int) -> bytes:
        """Read bytes; fewer than ``length`` at the end of the file."""
        return os.pread(self._file.fileno(), length, offset)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
        """Describe the contiguous tensor that starts ``offset`` bytes into the file."""
        return LazyTensor(shape, dtype, lambda: self.values(offset, math.prod(shape), dtype).view(shape))

    def values(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return ``count`` numbers, mapped when they are many, as a flat tensor."""
        length = count * dtype.itemsize
        if not length:
            return torch.empty(0, dtype=dtype)
        if length < SMALL or offset % dtype.itemsize:
            return torch.frombuffer(bytearray(self.bytes_at(offset, length)), dtype=dtype)
        skip = offset % mmap.ALLOCATIONGRANULARITY
        window = mmap.mmap(self._file.fileno(), length + skip, access=mmap.ACCESS_COPY, offset=offset - skip)
        return torch.frombuffer(window, dtype=dtype, count=count, offset=skip)
