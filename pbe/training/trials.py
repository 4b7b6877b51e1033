"""Trials of batch sizes: the search, and each size in a process of its own.

Lightning's BatchSizeFinder tries sizes in the running process: it sees a GPU's memory running out, but not
the CPU's, where the system kills the process; and it reports neither speed nor memory.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pbe.config import Config
from pbe.errors import UserError
from pbe.files import atomic_write

TOO_MUCH = 77  # exit status of a trial that went above the limit
POLL = 0.01  # seconds
GB = 1e9


class MemoryExceededError(Exception):
    """A trial was refused memory."""


@dataclass(frozen=True)
class Trial:
    """Outcome of one batch size.

    Attributes:
        size: of the batch.
        fits: whether the steps could be made within the limit.
        samples_per_second: of the measured steps, data included.
        peak: bytes at the most, of the GPU, else of the process without those that load data.
        largest: batch size that one epoch still fills.
        note: a remark for the user.
    """

    size: int
    fits: bool
    samples_per_second: float = 0.0
    peak: int = 0
    largest: int = 0
    note: str = ""

    def row(self) -> str:
        """Return the row of the table."""
        if not self.fits:
            return f"{self.size:>10}{'does not fit':>20}{'':>16}"
        return f"{self.size:>10}{self.samples_per_second:>20.2f}{self.peak / GB:>13.2f} GB"


Work = Callable[[Config, int, int], Trial]
"""A module's function that makes steps: configuration, batch size, limit in bytes (0: the device's own)."""


def search(trial: Callable[[int], Trial]) -> list[Trial]:
    """Double the size until it does not fit, then halve the gap until it is an eighth."""
    newest = trial(1)
    trials, most = [newest], max(newest.largest, 1)
    while newest.fits and newest.size < most:
        newest = trial(min(2 * newest.size, most))
        trials.append(newest)
    if newest.fits:
        return trials
    low, high = max((t.size for t in trials if t.fits), default=0), newest.size
    while high - low > max(1, low // 8):
        newest = trial((low + high) // 2)
        trials.append(newest)
        low, high = (newest.size, high) if newest.fits else (low, newest.size)
    return trials


def recommend(trials: list[Trial], limit: int) -> list[str]:
    """Return the recommendations that follow from the trials, in lines; nothing that fits is an error."""
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        where = f" into {limit / GB:.2f} GB" if limit else ""
        raise UserError(
            f"not even a batch of one fits{where}; allow more with --memory-limit, or use "
            "trainer.gradient_checkpointing=true, trainer.precision=bf16-mixed or a smaller model"
        )
    largest = max(fitting, key=lambda trial: trial.size)
    fastest = max(fitting, key=lambda trial: trial.samples_per_second)
    lines = [
        f"largest that fits: data.batch_size={largest.size}",
        f"fastest: data.batch_size={fastest.size} ({fastest.samples_per_second:.2f} samples a second)",
    ]
    if len(fitting) == len(trials):
        lines.append(f"note: an epoch fills no larger batch than {largest.size}, so none was tried")
    return [*lines, *sorted({f"note: {trial.note}" for trial in trials if trial.note})]


def try_size(work: Work, config: Config, size: int, limit: int) -> Trial:
    """Run ``work`` in a process of its own, whose death by lack of memory is an answer too."""
    with tempfile.TemporaryDirectory(prefix="pbe-batch-") as name:
        folder = Path(name)
        process = multiprocessing.get_context("spawn").Process(
            target=_in_process, args=(work, config, size, limit, folder)
        )
        process.start()
        try:
            process.join()
        finally:
            process.kill()
            process.join()
        outcome = folder / "outcome.json"
        if outcome.is_file():
            content = json.loads(outcome.read_text())
            if "error" in content:
                raise UserError(content["error"])
            return Trial(**content)
        if process.exitcode in (TOO_MUCH, -signal.SIGKILL):
            return Trial(size, fits=False)
        log = folder / "log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        last = lines[-1] if lines else "it said nothing"
        raise UserError(f"a batch of {size}: the trial ended with status {process.exitcode}: {last}")


def _in_process(work: Work, config: Config, size: int, limit: int, folder: Path) -> None:
    with (folder / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        outcome = asdict(work(config, size, limit))
    except UserError as error:
        outcome = {"error": str(error)}
    except (MemoryExceededError, MemoryError):
        outcome = asdict(Trial(size, fits=False))
    atomic_write(folder / "outcome.json", json.dumps(outcome))


class MemoryWatch:
    """Samples the memory of this process in a thread, and ends the process above a limit.

    The system's own peak is no use: it counts what the process was before it became this program.

    Attributes:
        limit: bytes; 0: none.
        peak: most bytes held so far.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.peak = limit, 0
        self._process = psutil.Process()
        self.sample()  # it may be above already, and before anything else can end it
        threading.Thread(target=self._watch, daemon=True).start()

    def sample(self) -> None:
        """Look at the memory now."""
        self.peak = max(self.peak, self._process.memory_info().rss)
        if 0 < self.limit < self.peak:
            os._exit(TOO_MUCH)

    def _watch(self) -> None:
        while True:
            time.sleep(POLL)
            self.sample()


def available_memory() -> int:
    """Return the bytes that this process may still take: of the machine, and of its control group."""
    free = psutil.virtual_memory().available
    most, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if most.is_file() and (text := most.read_text().strip()).isdigit():
        free = min(free, max(int(text) - int(used.read_text()), 0))
    return free
