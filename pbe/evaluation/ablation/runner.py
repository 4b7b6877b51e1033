"""Runs the stages of an ablation side by side, each in a process of its own, here or on a Ray cluster."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from queue import SimpleQueue

import torch

from pbe.cluster import RayCluster, result_of
from pbe.errors import UserError
from pbe.evaluation.ablation.stages import Stage
from pbe.files import FileLock, lock
from pbe.training.resume.signals import StopSignals, TrainingStopped

POLL_SECONDS = 0.2
TELL_SECONDS = 60.0
GRACE_SECONDS = 120.0  # for a training to write its checkpoint
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Schedule:
    """Estimates of stages, corrected by what the finished ones took, and the order to take them up in.

    Each stage stands behind those that it needs; ``rates`` are the seconds that a unit takes on one core.
    """

    def __init__(self, stages: Sequence[Stage], rates: Mapping[str, float]) -> None:
        self.stages, self.rates = stages, dict(rates)
        self.learn()

    def learn(self) -> None:
        """Take the rates of finished stages that were not interrupted in place of the assumed ones."""
        seconds: dict[str, float] = {}
        units: dict[str, float] = {}
        for mark in (stage.mark() for stage in self.stages):
            if mark is not None and not mark["resumed"] and mark["units"] > 0:
                seconds[mark["rate"]] = seconds.get(mark["rate"], 0.0) + mark["seconds"]
                units[mark["rate"]] = units.get(mark["rate"], 0.0) + mark["units"]
        self.rates |= {key: seconds[key] / units[key] for key in seconds}

    def seconds(self, stage: Stage) -> float:
        """Return the estimate of a whole stage."""
        return stage.units * self.rates[stage.rate]

    def pick(self, waiting: Sequence[Stage], done: set[str]) -> Stage | None:
        """Return the stage whose needs are met and that most seconds of others wait for; None without one."""
        after: dict[str, float] = {}  # from the start of a stage to the end of all that waits for it
        for stage in reversed(self.stages):
            behind = [after[other.fingerprint] for other in self.stages if stage.fingerprint in other.needs]
            after[stage.fingerprint] = self.seconds(stage) + max(behind, default=0.0)
        ready = [stage for stage in waiting if done.issuperset(stage.needs)]
        return max(ready, key=lambda stage: after[stage.fingerprint], default=None)

    def remaining(self, running: Mapping[str, float], jobs: int) -> float:
        """Return the seconds until everything is done with so many jobs, by playing the schedule through.

        ``running`` has the seconds since the start of the running stages, by fingerprint.
        """
        done = {stage.fingerprint for stage in self.stages if stage.mark() is not None}
        waiting = [s for s in self.stages if s.fingerprint not in done and s.fingerprint not in running]
        ends = {
            stage.fingerprint: max(self.seconds(stage) - running[stage.fingerprint], 0.0)
            for stage in self.stages
            if stage.fingerprint in running and stage.fingerprint not in done
        }
        now = 0.0
        while waiting or ends:
            while len(ends) < jobs and (stage := self.pick(waiting, done)) is not None:
                waiting.remove(stage)
                ends[stage.fingerprint] = now + self.seconds(stage)
            first = min(ends, key=lambda mark: ends[mark])
            now = max(now, ends.pop(first))
            done.add(first)
        return now

    def text(self, jobs: int) -> str:
        """Return the plan: every stage with its estimate, and how long all of it takes."""
        left = [stage for stage in self.stages if stage.mark() is None]
        lines = [
            f"{number:>3}  {stage.name:<62} {span(self.seconds(stage)) if stage in left else 'done':>10}"
            for number, stage in enumerate(self.stages, 1)
        ]
        total = sum(self.seconds(stage) for stage in left)
        return "\n".join(lines) + (
            f"\n{len(left)} of {len(self.stages)} stages to do: {span(total)} of one core, "
            f"about {span(self.remaining({}, jobs))} with {jobs} side by side"
        )


def span(seconds: float) -> str:
    """Return a time as people say it, such as ``1 h 05 min``, ``12 min`` or ``40 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def run_stage(
    stage: Stage, variables: Mapping[str, str], stopping: Callable[[], bool] = lambda: False
) -> None:
    """Run the command of a stage to its end in a process of its own, and mark the stage as done.

    A process that an earlier runner has left is waited for: it holds the stage's lock as long as it lives.
    ``variables`` are added to the environment. When ``stopping`` says so, it ends with TrainingStopped.
    """

    def check() -> None:
        if stopping():
            raise TrainingStopped

    started = time.monotonic()
    stage.prepare()
    with lock(stage.folder / ".lock", keep=True, check=check) as held:
        resumed = stage.log.exists()
        try:
            log = stage.log.open("ab")
        except OSError as error:
            raise UserError(f"cannot write '{stage.log}': {error.strerror}") from error
        with log:
            process = subprocess.Popen(
                [sys.executable, *stage.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | variables,
                start_new_session=True,  # Ctrl-C is the runner's to pass on
                preexec_fn=_end_with_parent,
                pass_fds=(held.descriptor,),
            )
        try:
            while process.poll() is None:
                check()
                time.sleep(POLL_SECONDS)
        finally:
            _end(process)
        if process.returncode or not (stage.folder / stage.makes).exists():
            raise UserError(_failure(stage, process.returncode))
        stage.finish(time.monotonic() - started, resumed)


def _end_with_parent() -> None:
    """Let a new process end when the runner dies, however that happens (on Linux), and listen to SIGINT.

    SIGINT is what stages are stopped with: every command of the project ends by it, saving what it has.
    Shells start processes in the background deaf to it, and so does Ray.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, wait for it, and kill it with all that it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(KeyboardInterrupt):  # Ray cancels more than once
            time.sleep(POLL_SECONDS)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failure(stage: Stage, status: int) -> str:
    lines = [line for line in stage.log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].rpartition("error: ")[2] if lines else "it printed nothing"
    how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
    return f"stage '{stage.name}' {how}: {last} (all of it in {stage.log})"


class LocalPool:
    """Processes of this machine; those side by side get one GPU each, in turn, and a single one has all.

    ``devices`` is the number of GPUs; None counts those there are.
    """

    def __init__(self, jobs: int, threads: int, devices: int | None = None) -> None:
        devices = torch.cuda.device_count() if devices is None else devices
        self.pool, self.stopping = ThreadPoolExecutor(jobs), threading.Event()
        self.slots: SimpleQueue[dict[str, str]] = SimpleQueue()
        for place in range(jobs):
            gpu = device_variables(place, devices, os.environ) if jobs > 1 else {}
            self.slots.put(_thread_variables(threads) | gpu)

    def submit(self, stage: Stage) -> Future[None]:
        """Start a stage in a free slot."""
        return self.pool.submit(self._run, stage)

    def _run(self, stage: Stage) -> None:
        slot = self.slots.get()
        try:
            run_stage(stage, slot, self.stopping.is_set)
        finally:
            self.slots.put(slot)

    def stop(self) -> None:
        """End all stages, and wait for them."""
        self.stopping.set()
        self.pool.shutdown(cancel_futures=True)


def device_variables(place: int, devices: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that give the process at a place one of several GPUs; none where fewer than two.

    Where CUDA_VISIBLE_DEVICES is set in the environment, its entries are shared out.
    """
    if devices < 2:
        return {}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(devices)]
    return {"CUDA_VISIBLE_DEVICES": names[:devices][place % devices].strip()}


class RayTasks:
    """Tasks of a Ray cluster, each a stage that takes ``threads`` cores and its GPUs."""

    def __init__(self, threads: int) -> None:
        self.cluster, self.variables = RayCluster(threads), _thread_variables(threads)

    def submit(self, stage: Stage) -> Future[None]:
        """Hand a stage to the cluster."""
        return self.cluster.submit(run_stage, stage, self.variables, gpus=stage.gpus)

    def stop(self) -> None:
        """End all stages, and wait for them."""
        self.cluster.stop()


def _thread_variables(threads: int) -> dict[str, str]:
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


Engine = LocalPool | RayTasks


def make_engine(name: str, jobs: int, threads: int) -> Engine:
    """Return the engine ``local`` or ``ray``."""
    if jobs < 1 or threads < 1:
        raise UserError("jobs and threads must be at least 1")
    return RayTasks(threads) if name == "ray" else LocalPool(jobs, threads)


def only_one(workspace: Path) -> AbstractContextManager[FileLock]:
    """Hold the lock of a workspace for a ``with`` block."""
    busy = f"another ablation runs in '{workspace}'; wait for it, or name another workspace"
    return lock(workspace / ".lock", keep=True, busy=busy)


class Runner:
    """Does the stages that are not done, ``jobs`` at a time; ``say`` takes lines about the progress."""

    def __init__(
        self, schedule: Schedule, engine: Engine, jobs: int, say: Callable[[str], None] = print
    ) -> None:
        self.schedule, self.engine, self.jobs, self.say = schedule, engine, jobs, say
        self.stages = schedule.stages
        self.running: dict[Future[None], tuple[Stage, float]] = {}
        self._label = {
            stage.fingerprint: f"[{number}/{len(self.stages)}] {stage.name}"
            for number, stage in enumerate(self.stages, 1)
        }

    def run(self) -> int:
        """Run until everything is done, something fails or a signal comes; returns the signal, or 0."""
        done = {stage.fingerprint for stage in self.stages if stage.mark() is not None}
        waiting = [stage for stage in self.stages if stage.fingerprint not in done]
        if done:
            self.say(f"{len(done)} of {len(self.stages)} stages are done already")
        told, stop = time.monotonic(), StopSignals()
        with stop.listening():
            try:
                while waiting or self.running:
                    if stop.received:
                        self.say("stopping; the same command goes on from here")
                        return stop.received
                    self._start_ready(waiting, done)
                    wait(self.running, POLL_SECONDS, FIRST_COMPLETED)
                    done |= self._finished()
                    if time.monotonic() - told > TELL_SECONDS and self.running:
                        told = time.monotonic()
                        self.say(f"{self._shares()}; about {self._left()} left")
            finally:
                self.engine.stop()
        return 0

    def _start_ready(self, waiting: list[Stage], done: set[str]) -> None:
        while len(self.running) < self.jobs and (stage := self.schedule.pick(waiting, done)):
            waiting.remove(stage)
            self.running[self.engine.submit(stage)] = (stage, time.monotonic())
            self.say(f"{self._label[stage.fingerprint]}; about {self._left()} left")

    def _finished(self) -> set[str]:
        """Take away the stages that have ended; returns the fingerprints of those that are done."""
        marks = set()
        for future in [future for future in self.running if future.done()]:
            stage, started = self.running.pop(future)
            result_of(future, f"stage '{stage.name}'")
            self.say(f"{self._label[stage.fingerprint]}: done in {span(time.monotonic() - started)}")
            self.schedule.learn()
            marks.add(stage.fingerprint)
        return marks

    def _left(self) -> str:
        now = time.monotonic()
        elapsed = {stage.fingerprint: now - started for stage, started in self.running.values()}
        return span(self.schedule.remaining(elapsed, self.jobs))

    def _shares(self) -> str:
        now, parts = time.monotonic(), []
        for stage, started in self.running.values():
            share = min((now - started) / max(self.schedule.seconds(stage), 1e-9), 0.99)
            parts.append(f"{self._label[stage.fingerprint]} (about {share:.0%})")
        return "; ".join(parts)
