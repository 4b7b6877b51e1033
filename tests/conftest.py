"""Shared fixtures; sets what must be set before the libraries are imported."""

from __future__ import annotations

import os

# Tests never reach for the network. Libraries read these when they are imported.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores already; threads of their own would fight over them.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Start every test from the same global random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden data (`original/`, `diffusers/`), which is kept outside the project.

    It is $PBE_GOLDEN; without that variable, the folder where the maintainers keep it, if it exists. Tests
    that ask for it are skipped where it is absent, but fail when PBE_REQUIRE_GOLDEN=1 says that it has to
    be there.
    """
    folder = Path(os.environ.get("PBE_GOLDEN") or ROOT.parent / "shared" / "golden")
    if folder.is_dir():
        return folder
    if os.environ.get("PBE_REQUIRE_GOLDEN") == "1":
        pytest.fail(f"golden data are required but {folder} is not a folder; set PBE_GOLDEN")
    pytest.skip("no golden data; PBE_GOLDEN names their folder")


@pytest.fixture
def ray_nodes(monkeypatch: pytest.MonkeyPatch, project_root: Path) -> Iterator[None]:
    """A Ray cluster of two nodes of a core each; their workers find the project on PYTHONPATH.

    Starting it takes up to a minute or two on a busy machine, so it is for slow tests.
    """
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Processes that are slow to start are no fault of what is tested.
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "60000")
    monkeypatch.setenv("RAY_health_check_timeout_ms", "60000")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "300")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(project_root), *filter(None, sys.path)]))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    ray.init(address=nodes.address, log_to_driver=False)
    assert len(ray.nodes()) == 2
    yield
    ray.shutdown()
    nodes.shutdown()
