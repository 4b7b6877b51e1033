"""Sums over samples, put together by name over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pbe.training.optimization.sharding import from_all_ranks
from pbe.training.tasks.base import Sums


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Sums]], list[dict[str, torch.Tensor]]]:
    """Return what puts the sums of several ranks together as collectives would, one rank after the other."""

    def reduced(all_sums: list[Sums]) -> list[dict[str, torch.Tensor]]:
        stacks: list[torch.Tensor] = []

        def gather(said: list[Any], value: Any) -> None:
            said[:] = [list(sums.totals) for sums in all_sums]

        def reduce(stacked: torch.Tensor) -> None:
            stacks.append(stacked.clone())
            if len(stacks) == len(all_sums):  # of equal shapes, else the real one fails
                stacked.copy_(torch.stack(stacks).sum(dim=0))

        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(all_sums))
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
        return [sums.reduced() for sums in all_sums]

    return reduced


def sums_of(**values: float) -> Sums:
    sums = Sums()
    for name, value in values.items():
        sums.add(name, torch.tensor([value]))
    return sums


def test_ranks_are_added_up_by_name_and_not_by_position(ranks):
    # the first rank holds what was measured before a restart, in the order of then
    first = sums_of(loss=1.0, norm=7.0, judge=0.5)
    second = sums_of(loss=2.0, judge=0.25, extra=9.0, norm=5.0)
    last = ranks([first, second])[-1]
    assert {name: float(total[0]) for name, total in last.items()} == {
        "loss": 3.0, "norm": 12.0, "judge": 0.75, "extra": 9.0,
    }  # fmt: skip
    assert {name: float(total[2]) for name, total in last.items()} == {
        "loss": 2, "norm": 2, "judge": 2, "extra": 1,
    }  # fmt: skip


def test_a_rank_that_has_measured_nothing_takes_part(ranks):
    last = ranks([sums_of(loss=1.5), Sums()])[-1]
    assert float(last["loss"][0]) == 1.5


def test_alone_there_is_nobody_to_ask():
    assert from_all_ranks("word") == ["word"]
    assert Sums().reduced() == {}
    sums = sums_of(loss=2.0)
    sums.add("loss", torch.tensor([4.0, float("nan")]))
    assert sums.means() == {"loss": 3.0}
