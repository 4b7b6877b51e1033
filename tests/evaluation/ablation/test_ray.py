"""Stages on Ray: a stand-in with Ray's few functions, and a cluster of two nodes on this machine.

Starting a cluster takes up to a minute or two on a busy machine, so it is left to the slow tests.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pbe.errors import UserError
from pbe.evaluation.ablation.runner import Runner, Schedule, make_engine
from pbe.evaluation.ablation.stages import Stage, fingerprint_of

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


class Task:
    """A call that was handed over: it is done when it is asked for."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def future(self) -> Future[None]:
        made: Future[None] = Future()
        try:
            made.set_result(self.call())
        except UserError as error:
            made.set_exception(type("RayTaskError", (Exception,), {"cause": error})("a long traceback"))
        return made


class StandIn(ModuleType):
    """As much of Ray as ablations use."""

    def __init__(self, **resources: float) -> None:
        super().__init__("ray")
        self.resources, self.asked, self.cancelled = resources, [], 0

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, **options: int) -> Callable[[Callable[..., None]], StandIn]:
        self.asked.append(options)
        return lambda function: self._of(function)

    def _of(self, function: Callable[..., None]) -> Any:
        outer = self

        class Remote:
            def options(self, **options: int) -> Remote:
                outer.asked.append(options)
                return self

            def remote(self, *arguments: Any) -> Task:
                return Task(lambda: function(*arguments))

        return Remote()

    def cancel(self, task: Task) -> None:
        self.cancelled += 1

    def wait(self, tasks: list[Task], num_returns: int, timeout: float) -> None:
        assert num_returns == len(tasks)


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


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, project_root: Path) -> Iterator[None]:
    """Two nodes of a core each; their workers find the project on PYTHONPATH."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

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
