"""Calls as tasks of a cluster, against a stand-in; the rooms that use it test it on two nodes of Ray."""

from __future__ import annotations

import os
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from pbe.cluster import RayCluster, result_of
from pbe.errors import UserError
from tests.ray_stand_in import StandIn


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn(GPU=2.0, CPU=4.0)
    monkeypatch.setitem(sys.modules, "ray", made)
    return made


def test_results_come_as_they_end_from_the_callers_folder(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cluster = RayCluster(cpus=2)
    found = cluster.completed(lambda number: (number, os.getcwd()), [(1,), (2,), (3,)], most=2, gpus=1)
    assert sorted(found) == [(number, str(tmp_path)) for number in (1, 2, 3)]
    assert stand_in.started == {"log_to_driver": False}
    assert stand_in.asked == [{"max_retries": 3, "num_cpus": 2}, *[{"num_gpus": 1}] * 3]
    assert (cluster.count("GPU"), cluster.count("TPU")) == (2, 0)
    assert list(cluster.completed(print, [])) == []


def test_the_first_failure_ends_the_others(stand_in: StandIn) -> None:
    def fail(number: int) -> None:
        raise UserError(f"number {number} cannot be done")

    with pytest.raises(UserError, match=r"^number 1 cannot be done$"):
        list(RayCluster().completed(fail, [(1,), (2,), (3,)], most=1))
    assert (stand_in.handed, stand_in.cancelled) == (1, 1)


def test_other_errors_are_told_apart() -> None:
    lost: Future[None] = Future()
    lost.set_exception(
        type("WorkerCrashedError", (Exception,), {"__module__": "ray.exceptions"})("gone\nlong")
    )
    with pytest.raises(UserError, match=r"^stage 'a' was lost: gone$"):
        result_of(lost, "stage 'a'")
    wrong: Future[None] = Future()
    wrong.set_exception(ZeroDivisionError("by zero"))
    with pytest.raises(ZeroDivisionError):
        result_of(wrong, "stage 'a'")
