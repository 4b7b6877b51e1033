"""Means over samples, whatever batches, micro-batches and ranks they came in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pbe.training.optimization.sharding import from_all_ranks, is_distributed

NORMAL_95 = 1.96  # half-width of a 95 % interval, in standard errors


class Sums:
    """Adds up named values sample by sample, in double precision and without waiting for the device.

    Attributes:
        totals: sum of the values, of their squares, and number of them, by name.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, counted: Tensor | None = None) -> None:
        """Add values; those that are not finite are left out (:mod:`pbe.training.optimization.non_finite`).

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
        """Return the totals over all ranks, on the CPU; every rank has to call it.

        Ranks are put together by name, whatever they have measured and in which order: after a restart the
        first one alone holds what all of them had measured before.
        """
        names = list(dict.fromkeys(name for rank in from_all_ranks(list(self.totals)) for name in rank))
        if not names:
            return {}
        # in one place: what a checkpoint held is on the CPU until it is added to
        device = _device(self.totals.values())
        nothing = torch.zeros(3, dtype=torch.float64, device=device)
        stacked = torch.stack([self.totals.get(name, nothing).to(device) for name in names])
        if is_distributed():
            torch.distributed.all_reduce(stacked)
        return dict(zip(names, stacked.cpu(), strict=True))

    def means(self) -> dict[str, float]:
        """Return the mean of each name over all ranks; names without a sample are left out."""
        return {name: float(total[0] / total[2]) for name, total in self.reduced().items() if total[2]}

    def clear(self) -> None:
        """Forget everything."""
        self.totals = {}


def _device(totals: Iterable[Tensor]) -> torch.device:
    """Return where totals are put together: NCCL takes GPU memory only."""
    if is_distributed():
        if torch.distributed.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
    return next((total.device for total in totals if total.device.type != "cpu"), torch.device("cpu"))


def half_interval(total: Tensor) -> float:
    """Return half the width of the 95 % interval of a mean, from a total of :meth:`Sums.reduced`."""
    values, squares, count = total.tolist()
    if count < 2:
        return float("nan")
    variance = max(squares / count - (values / count) ** 2, 0.0) * count / (count - 1)
    return NORMAL_95 * (variance / count) ** 0.5
