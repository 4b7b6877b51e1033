"""The runner: order, side by side, skipping, failing, stopping, and going on to the same results."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pbe.errors import UserError
from pbe.evaluation.ablation import runner as module
from pbe.evaluation.ablation.runner import (
    LocalPool,
    Runner,
    Schedule,
    device_variables,
    make_engine,
    only_one,
    run_stage,
    span,
)
from pbe.evaluation.ablation.stages import Stage, fingerprint_of
from tests.programs import Program

STAND_IN = Path(__file__).with_name("stand_in_stage.py")
RATES = {"step": 1.0}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look more often than stages of minutes need it."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)


def stage(folder: Path, name: str, *needs: Stage, **job: Any) -> Stage:
    job = {"steps": 2, "value": name, "reads": [str(one.folder / "result.txt") for one in needs]} | job
    return Stage(
        name,
        "training",
        fingerprint_of(name, [one.fingerprint for one in needs]),
        folder / name,
        (str(STAND_IN), str(folder / name)),
        job["steps"],
        "step",
        tuple(one.fingerprint for one in needs),
        "result.txt",
        job,
    )


def chain(folder: Path, held: dict[str, Any] | None = None, **job: Any) -> list[Stage]:
    """Return four stages, of which the second and the third, ``held`` by more, need the first alone."""
    first = stage(folder, "first", **job)
    left, right = (stage(folder, name, first, **job | (held or {})) for name in ("left", "right"))
    return [first, left, right, stage(folder, "last", left, right, **job)]


def runner(stages: list[Stage], jobs: int = 2, threads: int = 1, devices: int = 0) -> Runner:
    lines: list[str] = []
    pool = LocalPool(jobs, threads, devices)
    made = Runner(Schedule(stages, RATES), pool, jobs, lines.append)
    made.lines = lines  # type: ignore[attr-defined]
    return made


def shows(one: Stage, variable: str) -> Stage:
    """Return a stage that prints a variable of its environment first."""
    code = f"import os, runpy; print(os.environ.get({variable!r}, 'all'), flush=True); "
    code += f"runpy.run_path({str(STAND_IN)!r}, run_name='__main__')"
    return replace(one, command=("-c", code, str(one.folder)))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120.0
    while not path.exists():
        assert time.monotonic() < deadline, f"'{path}' does not come"
        time.sleep(0.02)


def runs(one: Stage) -> int:
    file = one.folder / "runs.txt"
    return len(file.read_text().split()) if file.exists() else 0


def results(stages: list[Stage]) -> list[str]:
    return [(one.folder / "result.txt").read_text() for one in stages]


def test_every_stage_runs_once_after_what_it_needs(tmp_path: Path) -> None:
    stages = chain(tmp_path)
    first = runner(stages)
    assert first.run() == 0
    assert [runs(one) for one in stages] == [1, 1, 1, 1]
    made = results(stages)
    assert made[3] == f"last({made[1]},{made[2]})last last "
    told = first.lines  # type: ignore[attr-defined]
    assert told[0].startswith("[1/4] first; about ")
    assert any(line.startswith("[4/4] last: done in ") for line in told)
    # a second run makes nothing
    second = runner(stages)
    assert second.run() == 0
    assert [runs(one) for one in stages] == [1, 1, 1, 1]
    assert second.lines == ["4 of 4 stages are done already"]  # type: ignore[attr-defined]


def test_a_changed_stage_is_made_again_and_a_finished_one_is_not(tmp_path: Path) -> None:
    stages = chain(tmp_path)
    runner(stages).run()
    changed = replace(stages[3], fingerprint="other")
    runner([*stages[:3], changed]).run()
    assert [runs(one) for one in stages] == [1, 1, 1, 2]


def test_stages_run_side_by_side_each_with_its_threads(tmp_path: Path) -> None:
    # each waits for a file of the other
    code = (
        "import os, pathlib, sys, time; own, other = map(pathlib.Path, sys.argv[1:]); own.write_text('here')"
    )
    code += "\nwhile not other.exists(): time.sleep(0.02)\nprint(os.environ['OMP_NUM_THREADS'])"
    files = [str(tmp_path / name / "result.txt") for name in ("a", "b")]
    stages = [
        replace(stage(tmp_path, name), command=("-c", code, *order))
        for name, order in (("a", files), ("b", files[::-1]))
    ]
    assert runner(stages, threads=3).run() == 0
    assert [one.log.read_text().split() for one in stages] == [["3"], ["3"]]


def test_gpus_are_shared_out() -> None:
    assert device_variables(1, 0, {}) == device_variables(1, 1, {}) == {}
    found = [device_variables(place, 2, {}) for place in range(3)]
    assert found == [{"CUDA_VISIBLE_DEVICES": number} for number in ("0", "1", "0")]
    own = {"CUDA_VISIBLE_DEVICES": "5, GPU-ab,7"}
    found = [device_variables(place, 3, own) for place in range(4)]
    assert found == [{"CUDA_VISIBLE_DEVICES": name} for name in ("5", "GPU-ab", "7", "5")]
    cut = {"CUDA_VISIBLE_DEVICES": "5,6,-1,7"}  # CUDA reads no further than the entry that is none
    assert device_variables(2, 2, cut) == {"CUDA_VISIBLE_DEVICES": "5"}


@pytest.mark.parametrize(("jobs", "wanted"), [(2, ["0", "1", "1"]), (1, ["all", "all", "all"])])
def test_stages_side_by_side_have_a_gpu_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, wanted: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    # the third takes the place of the second, which ends while the first is at work
    long = {"until": str(tmp_path / "c" / "result.txt")} if jobs == 2 else {}
    stages = [stage(tmp_path, "a", **long), stage(tmp_path, "b"), stage(tmp_path, "c")]
    stages = [shows(one, "CUDA_VISIBLE_DEVICES") for one in stages]
    assert runner(stages, jobs=jobs, devices=2).run() == 0
    assert [one.log.read_text().split()[0] for one in stages] == wanted


def test_a_failure_names_the_stage_and_stops_the_others(tmp_path: Path) -> None:
    slow = stage(tmp_path, "slow", until="/never")
    bad = stage(tmp_path, "bad", fails=True, until=str(slow.folder / "made.txt"))
    never = stage(tmp_path, "never", bad)
    with pytest.raises(UserError, match=r"'bad' failed with status 2: it cannot be done \(all of it in"):
        runner([slow, bad, never]).run()
    assert (slow.folder / "stopped.txt").exists()
    assert runs(never) == 0


def test_a_stage_that_ends_without_its_result_has_failed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 'odd' failed with status 0"):
        runner([stage(tmp_path, "odd", forgets=True)]).run()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes of the stages, as they are started."""
    made: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        made.append(popen(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(module.subprocess, "Popen", start)
    return made


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_the_same_results_come_later(
    tmp_path: Path, number: int, started: list[subprocess.Popen[bytes]]
) -> None:
    whole = chain(tmp_path / "whole", steps=4)
    runner(whole).run()
    go = tmp_path / "go"
    stages = chain(tmp_path / "cut", held={"until": str(go)}, steps=4)
    first = runner(stages)
    started.clear()
    pids: list[int] = []

    def interrupt() -> None:
        wait_for(stages[1].folder / "made.txt")
        wait_for(stages[2].folder / "made.txt")
        pids.extend(process.pid for process in started)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert first.run() == number
    thread.join()
    assert len(pids) == 3  # the first had ended
    assert not any(alive(process) for process in pids)
    assert (stages[1].folder / "stopped.txt").exists()
    assert stages[1].mark() is None
    go.touch()
    assert runner(stages).run() == 0
    assert [runs(one) for one in stages] == [1, 2, 2, 1]
    assert results(stages) == results(whole)


def test_a_child_that_was_killed_is_told_and_goes_on(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    go = tmp_path / "go"
    stages = [stage(tmp_path, "a", steps=8, until=str(go))]
    first = runner(stages)

    def kill() -> None:
        wait_for(stages[0].folder / "made.txt")
        started[0].send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(UserError, match="stage 'a' was ended by signal 9"):
        first.run()
    thread.join()
    go.touch()
    assert runner(stages).run() == 0
    assert results(stages) == ["a()" + "a " * 8]


@pytest.mark.parametrize("key", ["seconds", "units", "rate", "resumed"])
def test_a_mark_without_its_keys_is_none(tmp_path: Path, key: str) -> None:
    one = stage(tmp_path, "a")
    one.folder.mkdir()
    one.finish(1.0, False)
    content = json.loads((one.folder / "done.json").read_text())
    assert one.mark() == content
    for wrong in (content | {key: None}, {name: value for name, value in content.items() if name != key}):
        (one.folder / "done.json").write_text(json.dumps(wrong))
        assert one.mark() is None
    assert Schedule([one], RATES).remaining({}, 1) == 2.0


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot write '.*stage\.yaml': No space left on device"):
        runner([stage(tmp_path, "a")]).run()
    with pytest.raises(UserError, match=r"cannot lock '.*\.lock': No space left"), only_one(tmp_path):
        pass


def test_a_workspace_has_one_runner(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(UserError, match="another ablation runs"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


KILLED = """
import pickle, sys
from pathlib import Path
from pbe.evaluation.ablation.runner import LocalPool, Runner, Schedule
stages = pickle.loads(Path(sys.argv[1]).read_bytes())
Runner(Schedule(stages, {"step": 1.0}), LocalPool(1, 1, 0), 1).run()
"""


def test_a_killed_runner_takes_its_stages_along_and_the_next_one_waits_for_them(tmp_path: Path) -> None:
    one = stage(tmp_path, "a", steps=2)
    (tmp_path / "script.py").write_text(KILLED)
    (tmp_path / "stages").write_bytes(pickle.dumps([stage(tmp_path, "a", until="/never", linger=1.0)]))
    first = Program(tmp_path / "script.py", tmp_path / "stages", told=tmp_path)
    wait_for(one.folder / "made.txt")
    first.send_signal(signal.SIGKILL)
    first.finish()
    assert not (one.folder / "stopped.txt").exists()  # it lingers, and nobody marks it as done
    run_stage(one, {})
    assert (one.folder / "stopped.txt").exists()
    assert runs(one) == 2
    assert one.mark()["resumed"]  # type: ignore[index]


def test_the_plan_plays_the_schedule_through(tmp_path: Path) -> None:
    stages = chain(tmp_path, steps=60)
    schedule = Schedule(stages, RATES)
    assert schedule.remaining({}, 1) == 240.0
    assert schedule.remaining({}, 2) == 180.0
    assert schedule.remaining({stages[0].fingerprint: 45.0}, 2) == 135.0
    text = schedule.text(2)
    assert text.splitlines()[-1] == "4 of 4 stages to do: 4 min of one core, about 3 min with 2 side by side"
    # what a finished stage took corrects the others, unless it was interrupted
    stages[0].folder.mkdir()
    stages[0].finish(30.0, False)
    assert Schedule(stages, RATES).remaining({}, 2) == 60.0
    stages[0].finish(30.0, True)
    assert Schedule(stages, RATES).remaining({}, 2) == 120.0


def test_the_longest_way_goes_first(tmp_path: Path) -> None:
    short, first = stage(tmp_path, "short", steps=50), stage(tmp_path, "first", steps=10)
    stages = [short, first, stage(tmp_path, "second", first, steps=90)]
    assert Schedule(stages, RATES).pick(stages, set()) == first
    assert Schedule(stages, RATES).remaining({}, 2) == 100.0


@pytest.mark.parametrize(("jobs", "threads"), [(0, 1), (1, 0)])
def test_jobs_and_threads_are_checked(jobs: int, threads: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        make_engine("local", jobs, threads)


def test_spans() -> None:
    assert [span(value) for value in (12.3, 90, 3600, 5000)] == ["12 s", "2 min", "1 h 00 min", "1 h 23 min"]
