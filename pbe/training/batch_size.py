"""Finds how large a batch may be, by real optimizer steps on one device: each size in a process of its own.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from pytorch_lightning.utilities.memory import is_oom_error

from pbe.config import Config
from pbe.errors import UserError
from pbe.files import atomic_write
from pbe.training.plan import Stopwatch, available_memory, find_data, make_steps, on_gpu
from pbe.training.setup import apply_performance_options, build_model, make_task, prepare_process

TOO_MUCH = 77  # exit status of a trial that went above the limit
POLL = 0.01  # seconds
GB = 1e9
SHARE = 0.8  # of the memory that is available
HEAD = f"{'batch size':>10}{'samples a second':>20}{'peak memory':>16}"
# AdamW's moments are there after the first step, and a second one holds everything at once.
WARM_UP, MEASURED = 2, 3


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


def find_batch_size(
    config: Config, limit_gb: float = 0.0, show: Callable[[str], None] = print
) -> list[Trial]:
    """Try batch sizes on one device of this machine and return the trials; the run's folder stays as it is.

    ``limit_gb`` 0 stands for 80 % of the memory that is available, or all of a GPU. ``show`` takes the table.
    """
    if limit_gb < 0:
        raise UserError(f"--memory-limit is {limit_gb:g}; it must be a positive number of GB")
    limit = int(limit_gb * GB)
    if not limit and not on_gpu(config):
        limit = int(SHARE * available_memory())
    show(f"limit: {limit / GB:.2f} GB of memory" if limit else "limit: the GPU's memory")
    show(HEAD)

    def trial(size: int) -> Trial:
        result = try_size(measure, config, size, limit)
        show(result.row())
        return result

    trials = search(trial)
    for line in recommend(trials, limit):
        show(line)
    return trials


def trial_config(config: Config, size: int) -> Config:
    """Return the configuration of a trial: one device, and whatever begins later begins at once.

    Of accumulation two micro-batches are left: with them gradients are there while activations are.
    """
    one = {"devices": "1", "num_nodes": 1, "strategy": "auto", "overfit_batches": 0}
    trainer = replace(config.trainer, accumulate=min(config.trainer.accumulate, 2), **one)  # type: ignore[arg-type]
    data = replace(config.data, batch_size=size)
    loss = replace(config.autoencoder_loss, adversarial_start=0)
    return replace(config, data=data, trainer=trainer, autoencoder_loss=loss)


def measure(config: Config, size: int, limit: int) -> Trial:
    """Make the steps of a batch size; the process ends where they take more memory than ``limit`` bytes.

    Raises MemoryExceededError where the device has no more.
    """
    gpu = on_gpu(config)
    if gpu and limit:
        share = limit / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    memory = MemoryWatch(0 if gpu else limit)
    try:
        trial = _measured_steps(trial_config(config, size))
    except RuntimeError as error:
        if not is_oom_error(error):
            raise
        raise MemoryExceededError from error
    return replace(trial, peak=torch.cuda.max_memory_allocated() if gpu else memory.peak)


def _measured_steps(config: Config) -> Trial:
    prepare_process(config)
    model, config = build_model(config)
    apply_performance_options(model, config.trainer)
    task = make_task(config, model)
    notes: list[str] = []
    data = find_data(config, task, notes)
    if data is None:
        raise UserError(notes[-1])
    watch = Stopwatch(WARM_UP, MEASURED)
    accumulate, length = config.trainer.accumulate, data.length
    make_steps(config, task, data, watch)
    return Trial(
        size=config.data.batch_size,
        fits=True,
        samples_per_second=MEASURED * config.data.batch_size * accumulate / watch.seconds,
        largest=length // accumulate,
        note=notes[-1] if notes else "",
    )
