"""Programs in processes of their own that need not import for seconds: forked from one that has done so."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pbe.training.run", "pbe.editing", "pbe.evaluation.benchmark.generation"])

# Makes a fork what it would be if a person had started it; who starts tests may have it ignore Ctrl-C.
START = """
import multiprocessing, os, runpy, signal, sys
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)
for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(os.path.join(told, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
os.environ.clear()
os.environ.update(variables)
os.chdir(folder)
multiprocessing.set_start_method(None, force=True)
sys.argv = words
runpy.run_path(words[0], run_name="__main__")
"""


class Program:
    """A Python program that runs, the leader of a process group, which ends with the test at the latest.

    Args:
        script: to run, in the folder of this process.
        arguments: of its command line.
        told: folder for what it prints.
        variables: of its environment beside those of this process.

    Attributes:
        pid: of the process and of its group.
    """

    def __init__(
        self, script: Path, *arguments: object, told: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self._told = told
        for name in ("stdout", "stderr"):
            (told / name).touch()
        given = {
            "words": [str(script), *map(str, arguments)],
            "told": str(told),
            "folder": os.getcwd(),
            "variables": os.environ | (variables or {}),
        }
        self._process = FORKS.Process(target=exec, args=(START, given))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._leftover = weakref.finalize(self, _kill, self.pid)

    def poll(self) -> int | None:
        """Return the exit status, a signal's number below zero, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def finish(self, seconds: float = 240.0) -> tuple[int, str, str]:
        """Wait for the end; returns the exit status and what was printed, and as errors."""
        self._process.join(seconds)
        status = self.poll()
        if status is None:
            _kill(self.pid)
        self._leftover.detach()
        output, errors = ((self._told / name).read_text() for name in ("stdout", "stderr"))
        assert status is not None, f"no end in {seconds} seconds:\n{output}\n{errors}"
        return status, output, errors


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def run_ranks(script: Path, *arguments: object, told: Path) -> list[str]:
    """Run a script as the two ranks that a launcher starts on one machine; returns what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    ranks = []
    for rank in range(2):
        (told / f"rank{rank}").mkdir()
        variables = place | {"LOCAL_RANK": str(rank)}
        ranks.append(Program(script, *arguments, told=told / f"rank{rank}", variables=variables))
    outcome = [rank.finish() for rank in ranks]
    assert [status for status, _, _ in outcome] == [0, 0], outcome
    return [output for _, output, _ in outcome]
