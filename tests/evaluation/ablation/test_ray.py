"""Stages on Ray: a stand-in with Ray's few functions, and a cluster of two nodes on this machine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pbe.errors import UserError
from pbe.evaluation.ablation.runner import Runner, Schedule, make_engine
from pbe.evaluation.ablation.stages import Stage, fingerprint_of
from tests.ray_stand_in import StandIn

STAND_IN = Path(__file__).with_name("stand_in_stage.py")


def stage(folder: Path, name: str, *needs: Stage, gpus: int = 0, **job: Any) -> Stage:
    reads = [str(one.folder / "result.txt") for one in needs]
    marks = tuple(one.fingerprint for one in needs)
    command = (str(STAND_IN), str(folder / name))
    return Stage(
        name, "training", fingerprint_of(name), folder / name, command, 1.0, "step", marks,
        "result.txt", {"steps": 2, "value": name, "reads": reads} | job, gpus,
    )  # fmt: skip


def run(stages: list[Stage]) -> int:
    engine = make_engine("ray", len(stages), 1)
    return Runner(Schedule(stages, {"step": 1.0}), engine, len(stages), lambda line: None).run()


@pytest.mark.parametrize(("resources", "gpus"), [({"GPU": 2.0}, [2, 0]), ({}, [0, 0])])
def test_a_task_is_a_stage_with_its_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], gpus: list[int]
) -> None:
    stand_in = StandIn(**resources)
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    first = stage(tmp_path, "a", gpus=2)
    assert run([first, stage(tmp_path, "b", first)]) == 0
    assert (tmp_path / "b" / "result.txt").read_text() == "b(a()a a )b b "
    assert stand_in.asked == [{"max_retries": 3, "num_cpus": 1}, *({"num_gpus": number} for number in gpus)]


def test_failures_are_those_of_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", StandIn())
    with pytest.raises(UserError, match="stage 'a' failed with status 2: it cannot be done"):
        run([stage(tmp_path, "a", fails=True)])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        run([stage(tmp_path, "b")])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_nodes(ray_nodes: None, tmp_path: Path) -> None:
    """Stages run on both, a failure is told, and a signal ends what is running, which is resumed."""
    first = stage(tmp_path, "first")
    sides = [stage(tmp_path, name, first, pause=0.5) for name in ("left", "right")]
    assert run([first, *sides, stage(tmp_path, "last", *sides)]) == 0
    left, right = ((one.folder / "result.txt").read_text() for one in sides)
    assert (tmp_path / "last" / "result.txt").read_text() == f"last({left},{right})last last "
    with pytest.raises(UserError, match="stage 'bad' failed with status 2: it cannot be done"):
        run([stage(tmp_path, "bad", fails=True)])

    long = stage(tmp_path, "long", steps=20, pause=0.2)

    def interrupt() -> None:
        while not (long.folder / "made.txt").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run([long]) == signal.SIGTERM
    thread.join()
    deadline = time.monotonic() + 60.0
    while not (long.folder / "stopped.txt").exists():
        assert time.monotonic() < deadline, "it was not stopped, or killed"
        time.sleep(0.1)
    assert long.mark() is None
    assert run([long]) == 0
    assert (long.folder / "result.txt").read_text() == "long()" + "long " * 20
