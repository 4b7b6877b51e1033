"""Means over samples, whatever the batches, micro-batches and ranks they came in."""

from __future__ import annotations

import torch
from torch import Tensor

NORMAL_95 = 1.96  # half-width of a 95 % interval, in standard errors


class Sums:
    """Adds up named values sample by sample, in double precision and without waiting for the device.

    Attributes:
        totals: sum of the values, of their squares, and number of them, by name.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, counted: Tensor | None = None) -> None:
        """Add values; those that are not finite are left out (:mod:`pbe.training.guard` speaks of them).

        Args:
            name: what they are.
            values: any shape, one for each sample.
            counted: the same shape, bool: which of them count; None counts all.
        """
        values = values.detach().double()
        kept = torch.isfinite(values)
        if counted is not None:
            kept &= counted.to(values.device)
        ones, values = kept.to(values), torch.where(kept, values, torch.zeros_like(values))
        total = torch.stack([values.sum(), (values**2).sum(), ones.sum()])
        if name in self.totals:
            self.totals[name] = self.totals[name].to(total.device)  # a checkpoint's are on the CPU
        self.totals[name] = self.totals[name] + total if name in self.totals else total

    def reduced(self) -> dict[str, Tensor]:
        """Return the totals over all ranks, on the CPU; every rank has to ask, with the same names."""
        if not self.totals:
            return {}
        stacked = torch.stack(list(self.totals.values()))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(stacked)
        return dict(zip(self.totals, stacked.cpu(), strict=True))

    def means(self) -> dict[str, float]:
        """Return the mean of each name over all ranks; names without a sample are left out."""
        return {name: float(total[0] / total[2]) for name, total in self.reduced().items() if total[2]}

    def clear(self) -> None:
        """Forget everything."""
        self.totals = {}


def band(total: Tensor) -> float:
    """Return half the width of the 95 % interval of a mean, from one of :meth:`Sums.reduced`'s totals."""
    values, squares, count = total.tolist()
    if count < 2:
        return float("nan")
    variance = max(squares / count - (values / count) ** 2, 0.0) * count / (count - 1)
    return NORMAL_95 * (variance / count) ** 0.5
