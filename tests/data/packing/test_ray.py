"""Packing on Ray: a cluster of two nodes on this machine gives the bytes that one process gives.

Starting a cluster takes up to a minute or two on a busy machine, so it is left to the slow tests. The quick
ones run the same engine against a stand-in that has Ray's few functions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pbe.errors import UserError
from tests.data.packing.support import contents, make_plain, pack, pack_straight, request_of


class RemoteTask:
    """What ``ray.remote`` makes of a function; each call is counted and waits until it is asked for."""

    def __init__(self, function: Callable[..., int], waiting: list[int]) -> None:
        self.function, self.waiting = function, waiting

    def remote(self, *arguments: Any) -> Callable[[], int]:
        self.waiting[0] += 1
        self.waiting[1] = max(self.waiting)
        return lambda: self.function(*arguments)


class StandIn(ModuleType):
    """As much of Ray as packing uses; ``most`` is the number of tasks that ever waited at a time."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.started: dict[str, Any] = {}
        self.waiting = [0, 0]
        self.retries = 0

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.started = options

    def remote(self, max_retries: int) -> Callable[[Callable[..., int]], RemoteTask]:
        self.retries = max_retries
        return lambda function: RemoteTask(function, self.waiting)

    def wait(self, pending: list[Any]) -> tuple[list[Any], list[Any]]:
        return pending[-1:], pending[:-1]  # whichever is done first

    def get(self, done: list[Callable[[], int]]) -> list[int]:
        self.waiting[0] -= len(done)
        return [task() for task in done]


@pytest.mark.parametrize(("workers", "most"), [(2, 2), (0, 5)])
def test_the_engine_without_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, most: int
) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    (tmp_path / "plain").mkdir()
    plain = make_plain(tmp_path / "plain")
    request = request_of(plain, tmp_path / "out", shard_pictures=7, perceptual=False)
    steps: list[int] = []
    assert pack(request, engine="ray", workers=workers, progress=lambda _: steps.append) is not None
    assert contents(request.out) == pack_straight(plain, tmp_path / "straight")
    assert stand_in.waiting == [0, most]
    assert stand_in.retries > 0
    assert stand_in.started == {"log_to_driver": False}
    assert sorted(steps) == [2, 7, 7, 7, 7]


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="pip install ray"):
        pack(request_of(make_plain(tmp_path / "plain"), tmp_path / "out"), engine="ray")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, project_root: Path) -> Iterator[None]:
    """Two nodes of a core each; their workers find the project on PYTHONPATH."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Processes that are slow to start are no fault of packing.
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "60000")
    monkeypatch.setenv("RAY_health_check_timeout_ms", "60000")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "300")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(project_root), *filter(None, sys.path)]))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_nodes(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = make_plain(tmp_path / "plain")
    assert len(sys.modules["ray"].nodes()) == 2
    request = request_of(plain, tmp_path / "out", shard_pictures=7, perceptual=False)
    assert pack(request, engine="ray", workers=2) is not None
    assert contents(request.out) == pack_straight(plain, tmp_path / "straight")
