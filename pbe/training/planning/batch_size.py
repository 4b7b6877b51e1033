"""Finds how large a batch may be: real optimizer steps, each size in a process of its own.

Lightning's BatchSizeFinder tries sizes in the running process: it sees a GPU's memory running out, but not
the CPU's, where the system kills the process; and it tells neither speed nor memory.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pbe.config import Config
from pbe.errors import UserError
from pbe.files import atomic_write

SHARE = 0.8  # of the memory that is available
TOO_MUCH = 77  # exit status of a trial that went above the limit
POLL = 0.01  # seconds
GB = 1e9
HEAD = f"{'batch size':>10}{'samples a second':>20}{'peak memory':>16}"


class MemoryExceededError(Exception):
    """A trial was refused memory."""


@dataclass(frozen=True)
class Trial:
    """What came of one batch size.

    Attributes:
        size: of the batch.
        fits: whether the steps could be made within the limit.
        samples_per_second: of the measured steps, data included.
        peak: bytes at the most, of the GPU, else of the process without those that load data.
        largest: batch size that one epoch still fills.
        note: what else has to be known.
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
"""Makes steps: of a configuration, with a batch size, within so many bytes (0: the device's own limit)."""


def find_batch_size(config: Config, limit_gb: float = 0.0, say: Callable[[str], None] = print) -> list[Trial]:
    """Try batch sizes on one device of this machine; nothing is written into the run's folder.

    Args:
        config: the experiment.
        limit_gb: memory limit in GB; 0: 80 % of what is available, or all of a GPU.
        say: takes the table, row by row.

    Returns:
        The trials, in their order.

    Raises:
        UserError: as the run itself would, or not even a batch of one fits.
    """
    from pbe.training.planning.batch_trial import measure  # slow to import, and needed in the trials only

    if limit_gb < 0:
        raise UserError(f"--memory-limit is {limit_gb:g}; it must be a positive number of GB")
    limit = int(limit_gb * GB)
    if not limit and not on_gpu(config):
        limit = int(SHARE * available_memory())
    say(f"limit: {limit / GB:.2f} GB of memory" if limit else "limit: the GPU's memory")
    say(HEAD)

    def trial(size: int) -> Trial:
        result = try_size(measure, config, size, limit)
        say(result.row())
        return result

    trials = search(trial)
    for line in recommend(trials, limit):
        say(line)
    return trials


def on_gpu(config: Config) -> bool:
    """Say whether a configuration trains on CUDA here."""
    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def search(trial: Callable[[int], Trial]) -> list[Trial]:
    """Double the size until it does not fit, then halve the gap until it is an eighth.

    Args:
        trial: tries a size.
    """
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
    """Return what follows from the trials, in lines.

    Raises:
        UserError: nothing fits.
    """
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
    """Run ``work`` in a process of its own, whose death by lack of memory is an answer too.

    Args:
        work: a function of a module, which the process imports.
        config: the experiment.
        size: of the batch.
        limit: bytes.

    Raises:
        UserError: that of ``work``, or what it said last when it ended in another way.
    """
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
        said = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        last = said[-1] if said else "it said nothing"
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


def end_above(limit: int) -> None:
    """Let this process end itself when it takes more than ``limit`` bytes: now, or watched by a thread."""

    def watch() -> None:
        while peak_of_process() <= limit:
            time.sleep(POLL)
        os._exit(TOO_MUCH)

    if peak_of_process() > limit:  # already, and before anything else can end it
        os._exit(TOO_MUCH)
    threading.Thread(target=watch, daemon=True).start()


def peak_of_process() -> int:
    """Return the most bytes this process has held so far.

    Linux's ``getrusage`` counts what the process was before it was this program; its status file does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return _kilobytes(status, "VmHWM")
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory() -> int:
    """Return the bytes that this process may still take: of the machine, and of its control group."""
    table = Path("/proc/meminfo")
    if table.is_file():
        free = _kilobytes(table, "MemAvailable")
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if most.is_file() and (text := most.read_text().strip()).isdigit():
        free = min(free, max(int(text) - int(used.read_text()), 0))
    return free


def _kilobytes(path: Path, name: str) -> int:
    """Return the bytes of a line ``name:  123 kB``."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
