"""The runner: order, side by side, skipping, failing, stopping, and going on to the same results."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pbe.errors import UserError
from pbe.evaluation.ablation.runner import Runner, device_variables, only_one
from pbe.evaluation.ablation.schedule import Schedule, plan_text, span
from pbe.evaluation.ablation.stages import Stage, fingerprint_of

STAND_IN = Path(__file__).with_name("stand_in_stage.py")
ROOT = STAND_IN.parents[2]
RATES = {"step": 1.0}


def command(job: Path) -> list[str]:
    return [sys.executable, str(STAND_IN), str(job)]


@pytest.fixture(autouse=True)
def _reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def stage(folder: Path, name: str, *needs: Stage, **job: Any) -> Stage:
    job = {"steps": 2, "value": name, "reads": [str(one.folder / "result.txt") for one in needs]} | job
    mark = fingerprint_of(name, [one.fingerprint for one in needs])
    return Stage(
        name,
        "training",
        mark,
        folder / name,
        job["steps"],
        "step",
        tuple(one.fingerprint for one in needs),
        job,
    )


def chain(folder: Path, **job: Any) -> list[Stage]:
    first = stage(folder, "first", **job)
    left, right = stage(folder, "left", first, **job), stage(folder, "right", first, **job)
    return [first, left, right, stage(folder, "last", left, right, **job)]


def runner(stages: list[Stage], jobs: int = 2, **rest: Any) -> Runner:
    lines: list[str] = []
    made = Runner(stages, Schedule(stages, RATES), jobs=jobs, say=lines.append, command=command, **rest)
    made.lines = lines  # type: ignore[attr-defined]
    return made


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
    slow = {"pause": 0.4, "steps": 2}
    stages = [stage(tmp_path, "a", **slow), stage(tmp_path, "b", **slow)]
    both = runner(stages, threads=3)
    seen = []

    def spy(job: Path) -> list[str]:
        seen.append(len(both.running))
        return ["/bin/sh", "-c", f'echo "$OMP_NUM_THREADS" && exec "{sys.executable}" "{STAND_IN}" "{job}"']

    both.command = spy
    assert both.run() == 0
    assert seen == [0, 1]  # the second started while the first ran
    assert (tmp_path / "a" / "log.txt").read_text().split() == ["3"]


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
    long = {"steps": 60, "pause": 0.1} if jobs == 2 else {}
    stages = [stage(tmp_path, "a", **long), stage(tmp_path, "b"), stage(tmp_path, "c")]
    both = runner(stages, jobs=jobs, devices=2)
    show = 'echo "${CUDA_VISIBLE_DEVICES-all}" && exec'
    both.command = lambda job: ["/bin/sh", "-c", f'{show} "{sys.executable}" "{STAND_IN}" "{job}"']
    assert both.run() == 0
    assert [one.log.read_text().split()[0] for one in stages] == wanted


def test_a_failure_names_the_stage_and_stops_the_others(tmp_path: Path) -> None:
    slow = stage(tmp_path, "slow", steps=1000, pause=0.05)
    bad = stage(tmp_path, "bad", fails=True)
    never = stage(tmp_path, "never", bad)
    with pytest.raises(UserError, match=r"'bad' failed with status 2: it cannot be done \(all of it in"):
        runner([slow, bad, never]).run()
    assert (slow.folder / "stopped.txt").exists()
    assert runs(never) == 0


def test_a_stage_that_ends_without_its_mark_has_failed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 'odd' failed with status 0"):
        runner([stage(tmp_path, "odd", forgets=True)]).run()


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_the_same_results_come_later(tmp_path: Path, number: int) -> None:
    whole = chain(tmp_path / "whole", steps=4)
    runner(whole).run()
    stages = chain(tmp_path / "cut", steps=4, pause=0.3)
    first = runner(stages)
    pids: list[int] = []

    def interrupt() -> None:
        while not (stages[1].folder / "made.txt").exists():
            time.sleep(0.02)
        pids.extend(process.pid for _, process, _ in first.running.values())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert first.run() == number
    thread.join()
    assert len(pids) == 2
    assert not any(alive(process) for process in pids)
    assert (stages[1].folder / "stopped.txt").exists()
    assert stages[1].mark() is None
    assert runner(stages).run() == 0
    assert [runs(one) for one in stages] == [1, 2, 2, 1]
    assert results(stages) == results(whole)


def test_a_child_that_was_killed_is_told_and_goes_on(tmp_path: Path) -> None:
    stages = [stage(tmp_path, "a", steps=8, pause=0.2)]
    first = runner(stages)

    def kill() -> None:
        while not (stages[0].folder / "made.txt").exists():
            time.sleep(0.02)
        os.kill(next(iter(first.running.values()))[1].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(UserError, match="stage 'a' was ended by signal 9"):
        first.run()
    thread.join()
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

    stages = [stage(tmp_path, "a")]
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot write '.*stage\.json': No space left on device"):
        runner(stages).run()
    with pytest.raises(UserError, match=r"cannot lock '.*\.lock': No space left"), only_one(tmp_path):
        pass


def test_a_workspace_has_one_runner(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(UserError, match="another ablation runs"), only_one(tmp_path):
        pass
    with only_one(tmp_path) as lock:
        assert lock > 0


def test_a_process_that_outlives_its_runner_keeps_the_workspace(tmp_path: Path) -> None:
    with only_one(tmp_path) as lock:
        process = subprocess.Popen(["sleep", "30"], pass_fds=(lock,))
    with pytest.raises(UserError, match="another ablation runs"), only_one(tmp_path):
        pass
    process.kill()
    process.wait()
    with only_one(tmp_path):
        pass


def test_the_plan_plays_the_schedule_through(tmp_path: Path) -> None:
    stages = chain(tmp_path, steps=60)
    schedule = Schedule(stages, RATES)
    assert schedule.remaining({}, 1) == 240.0
    assert schedule.remaining({}, 2) == 180.0
    assert schedule.remaining({stages[0].fingerprint: 45.0}, 2) == 135.0
    text = plan_text(stages, schedule, 2)
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


def test_jobs_and_threads_are_checked(tmp_path: Path) -> None:
    for wrong in ({"jobs": 0}, {"threads": 0}):
        with pytest.raises(UserError, match="at least 1"):
            runner(chain(tmp_path), **wrong)


def test_spans() -> None:
    assert [span(value) for value in (12.3, 90, 3600, 5000)] == ["12 s", "2 min", "1 h 00 min", "1 h 23 min"]
