"""Runs the stages of an ablation side by side, each in a process of its own, and stops them all together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from pbe.errors import UserError
from pbe.evaluation.ablation.schedule import Schedule, span
from pbe.evaluation.ablation.stages import Stage, write_json
from pbe.files import lock, make_folder
from pbe.training.resume.signals import StopSignals

POLL_SECONDS = 0.2
TELL_SECONDS = 60.0
GRACE_SECONDS = 120.0  # for a training to write its checkpoint
JOB = "stage.json"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Command = Callable[[Path], list[str]]


def worker_command(job: Path) -> list[str]:
    """Return the command line of the process that does a stage."""
    return [sys.executable, "-m", "pbe.evaluation.ablation.worker", str(job)]


def device_variables(place: int, devices: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that give a process one of several GPUs; none where there are fewer than two.

    Args:
        place: of the process among those side by side, from 0 up.
        devices: how many GPUs this process sees.
        environment: its own; where CUDA_VISIBLE_DEVICES is set, its entries are shared out.
    """
    if devices < 2:
        return {}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(devices)]
    return {"CUDA_VISIBLE_DEVICES": names[:devices][place % devices].strip()}


class Runner:
    """Does the stages that are not done.

    Args:
        stages: each behind those that it needs.
        schedule: estimates and order.
        jobs: stages side by side.
        threads: CPU threads of each.
        say: takes lines about the progress.
        command: of the process of a stage, from the file that describes it.
        lock: file descriptor that the processes keep open as long as they live.
        devices: GPUs, of which stages side by side get one each, in turn; None counts those there are. One
            stage at a time has all of them.

    Raises:
        UserError: jobs or threads below 1.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: Schedule,
        *,
        jobs: int = 1,
        threads: int = 1,
        say: Callable[[str], None] = print,
        command: Command = worker_command,
        lock: int | None = None,
        devices: int | None = None,
    ) -> None:
        if jobs < 1 or threads < 1:
            raise UserError("jobs and threads must be at least 1")
        self.stages, self.schedule, self.jobs, self.threads = stages, schedule, jobs, threads
        self.say, self.command = say, command
        self.kept_open = () if lock is None else (lock,)
        self.devices = torch.cuda.device_count() if devices is None else devices
        self._places: dict[str, int] = {}
        self.running: dict[str, tuple[Stage, subprocess.Popen[bytes], float]] = {}
        self._number = {stage.fingerprint: number for number, stage in enumerate(stages, 1)}

    def run(self) -> int:
        """Run until everything is done, something fails or a signal comes; returns the signal, or 0.

        Raises:
            UserError: a stage failed; the others are stopped, and the same command goes on.
        """
        stop = StopSignals()
        done = {stage.fingerprint for stage in self.stages if stage.mark() is not None}
        waiting = [stage for stage in self.stages if stage.fingerprint not in done]
        if done:
            self.say(f"{len(done)} of {len(self.stages)} stages are done already")
        told = time.monotonic()
        with stop.listening():
            try:
                while waiting or self.running:
                    if stop.received:
                        self.say("stopping; the same command goes on from here")
                        return stop.received
                    done |= self._finished()
                    self._start_ready(waiting, done)
                    if time.monotonic() - told > TELL_SECONDS:
                        told = time.monotonic()
                        self.say(self._status(told))
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop_all()
        return 0

    def _start_ready(self, waiting: list[Stage], done: set[str]) -> None:
        while len(self.running) < self.jobs:
            stage = self.schedule.pick(waiting, done)
            if stage is None:
                return
            waiting.remove(stage)
            self._start(stage)

    def _start(self, stage: Stage) -> None:
        make_folder(stage.folder)
        job = stage.folder / JOB
        write_json(job, asdict(stage) | {"folder": str(stage.folder), "resumed": stage.log.exists()})
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        place = min(set(range(self.jobs)) - {self._places[mark] for mark in self.running})
        if self.jobs > 1:
            environment |= device_variables(place, self.devices, os.environ)
        with _opened(stage.log, "ab") as log:
            process = subprocess.Popen(
                self.command(job),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is this process' to pass on
                pass_fds=self.kept_open,
            )
        self.running[stage.fingerprint] = (stage, process, time.monotonic())
        self._places[stage.fingerprint] = place
        left = span(self.schedule.remaining(self._elapsed(time.monotonic()), self.jobs))
        self.say(f"[{self._number[stage.fingerprint]}/{len(self.stages)}] {stage.name}; about {left} left")

    def _finished(self) -> set[str]:
        """Take away the stages that have ended; returns those that are done."""
        done = set()
        for mark, (stage, process, started) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[mark]
            if process.returncode != 0 or stage.mark() is None:
                raise UserError(_failure(stage, process.returncode))
            took = span(time.monotonic() - started)
            self.say(f"[{self._number[mark]}/{len(self.stages)}] {stage.name}: done in {took}")
            self.schedule.learn()
            done.add(mark)
        return done

    def _elapsed(self, now: float) -> dict[str, float]:
        return {mark: now - started for mark, (_, _, started) in self.running.items()}

    def _status(self, now: float) -> str:
        parts = []
        for mark, (stage, _, started) in self.running.items():
            share = min((now - started) / max(self.schedule.seconds(stage), 1e-9), 0.99)
            parts.append(f"[{self._number[mark]}/{len(self.stages)}] {stage.name} (about {share:.0%})")
        left = span(self.schedule.remaining(self._elapsed(now), self.jobs))
        return f"{'; '.join(parts)}; about {left} left"

    def _stop_all(self) -> None:
        """Ask every process to end, wait for it, and end those that do not."""
        for _, process, _ in self.running.values():
            with suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for _, process, _ in self.running.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0.0))
        finally:
            for _, process, _ in self.running.values():
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.wait()
            self.running.clear()


def _failure(stage: Stage, status: int) -> str:
    lines = [line for line in stage.log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ") if lines else "it printed nothing"
    how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
    return f"stage '{stage.name}' {how}: {last} (all of it in {stage.log})"


def _opened(path: Path, mode: str) -> IO[Any]:
    try:
        return path.open(mode)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error


@contextmanager
def only_one(workspace: Path) -> Iterator[int]:
    """Hold the lock of a workspace, and yield its file descriptor.

    The system takes it back when its holder and all processes that were given the descriptor are gone.

    Raises:
        UserError: another process holds it.
    """
    busy = f"another ablation runs in '{workspace}'; wait for it, or name another workspace"
    with lock(workspace / ".lock", keep=True, busy=busy) as held:
        yield held.descriptor
