"""Packing on Ray: a cluster of two nodes on this machine gives the bytes that one process gives."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbe.data.packing import pack
from tests.data.packing_support import contents, make_plain, pack_straight, request_of

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, project_root: Path) -> Iterator[None]:
    """Two nodes of a core each; their workers find the project on PYTHONPATH."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(project_root), *filter(None, sys.path)]))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()
    nodes.shutdown()


def test_two_nodes(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = make_plain(tmp_path / "plain")
    assert len(ray.nodes()) == 2
    request = request_of(plain, tmp_path / "out", shard_pictures=7, perceptual=False)
    assert pack(request, engine="ray", workers=2) is not None
    assert contents(request.out) == pack_straight(plain, tmp_path / "straight")
