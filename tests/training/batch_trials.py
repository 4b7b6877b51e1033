"""Trials that end in every way a trial may end. The processes of the tests import them from here."""

from __future__ import annotations

import os
import signal
import time

from pbe.config import Config
from pbe.errors import UserError
from pbe.training.trials import MemoryExceededError, MemoryWatch, Trial

EACH = 40_000_000  # bytes a sample takes


def greedy(config: Config, size: int, limit: int) -> Trial:
    """Take memory for each sample, and time."""
    memory = MemoryWatch(0)
    memory.limit = limit + memory.peak  # for the samples, beside what Python and its libraries take
    held = [bytearray(os.urandom(1024)) * (EACH // 1024) for _ in range(size)]
    time.sleep(0.1)
    return Trial(size, fits=True, samples_per_second=float(len(held)), peak=memory.peak, largest=100)


def killed(config: Config, size: int, limit: int) -> Trial:
    """End as the system ends what takes its last memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refused(config: Config, size: int, limit: int) -> Trial:
    raise MemoryExceededError


def mistaken(config: Config, size: int, limit: int) -> Trial:
    raise UserError("no such shards")


def broken(config: Config, size: int, limit: int) -> Trial:
    raise ZeroDivisionError(f"size {size}")
