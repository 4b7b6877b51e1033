"""Packing on Ray: a cluster of two nodes, and a stand-in, give the bytes that one process gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pbe.errors import UserError
from tests.data.packing.support import contents, make_plain, pack, pack_straight, request_of
from tests.ray_stand_in import StandIn


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
    waiting: list[int] = []
    stand_in.when_handed = lambda handed: waiting.append(handed - len(steps))
    assert pack(request, engine="ray", workers=workers, progress=lambda _: steps.append) is not None
    assert contents(request.out) == pack_straight(plain, tmp_path / "straight")
    assert (stand_in.handed, max(waiting)) == (5, most)
    assert stand_in.asked[0] == {"max_retries": 3, "num_cpus": 1}
    assert stand_in.started == {"log_to_driver": False}
    assert sorted(steps) == [2, 7, 7, 7, 7]


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="pip install ray"):
        pack(request_of(make_plain(tmp_path / "plain"), tmp_path / "out"), engine="ray")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_nodes(ray_nodes: None, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = make_plain(tmp_path / "plain")
    request = request_of(plain, tmp_path / "out", shard_pictures=7, perceptual=False)
    assert pack(request, engine="ray", workers=2) is not None
    assert contents(request.out) == pack_straight(plain, tmp_path / "straight")
