"""Measure training: samples a second, the share of waiting for data, the cost of one step, two processes."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from pbe.config import CacheConfig, Config, save_yaml
from pbe.data.datamodule import TrainingData
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.training.latent_cache.builder import ensure_cache
from pbe.training.latent_cache.dataset import CachedDataModule
from pbe.training.monitoring.callbacks import peak_memory
from pbe.training.monitoring.loggers import read_curve
from pbe.training.resume.signals import StopSignals
from pbe.training.setup import (
    apply_performance_options,
    build_model,
    make_task,
    make_trainer,
    prepare_process,
)


@dataclass(frozen=True)
class Speed:
    """What training does in a second.

    Attributes:
        samples_per_second: over whole steps, waiting included.
        wait_share: of the time, spent waiting for batches.
        step_seconds: median of the optimizer steps, with the waiting before each.
    """

    samples_per_second: float
    wait_share: float
    step_seconds: float


class StepClock(pl.Callback):
    """Notes when each optimizer step ended, and how long had been waited for data by then."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data
        self.ends: list[float] = []
        self.waits: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note the end of a step."""
        if trainer.global_step > len(self.ends):
            self.ends.append(time.perf_counter())
            self.waits.append(self.data.waited)


def quiet(config: Config, steps: int) -> Config:
    """Return the configuration of a short run that writes nothing and does not validate."""
    short = replace(
        config.trainer, max_steps=steps, max_epochs=0, progress=False, profiler="", resume="never"
    )
    logging = replace(config.logging, loggers=[], grid_every=0)
    return replace(config, trainer=short, logging=logging)


def random_or_built(config: Config) -> tuple[LatentDiffusion, Config]:
    """Build the model as training does where its weights are named, else with random ones."""
    prepare_process(config)
    if config.autoencoder_from or config.start:
        return build_model(config)
    return LatentDiffusion(config.model), config


def time_steps(config: Config, model: LatentDiffusion, warm_up: int, steps: int, *, cached: bool) -> Speed:
    """Train some steps that are not measured, then some that are.

    Args:
        config: its ``cache.folder`` is built first when it is not there, if ``cached``.
        model: trained in place.
        warm_up: optimizer steps before the measured ones: what the loader has in store is used up in them.
        steps: that are measured.
        cached: train from the cache.
    """
    config = quiet(config, warm_up + steps)
    ends, waits = (times[warm_up - 1 :] for times in _fit(config, model, cached=cached))
    model.zero_grad(set_to_none=True)
    gc.collect()  # trainer and task know each other and hold the moments: the next round has its own
    passed = ends[-1] - ends[0]
    samples = steps * config.data.batch_size * config.trainer.accumulate
    lengths = [later - earlier for earlier, later in pairwise(ends)]
    return Speed(samples / passed, (waits[-1] - waits[0]) / passed, statistics.median(lengths))


def _fit(config: Config, model: LatentDiffusion, *, cached: bool) -> tuple[list[float], list[float]]:
    """Train; returns the times of :class:`StepClock`, and nothing that keeps the trainer alive."""
    data = CachedDataModule(config, ensure_cache(config, model)) if cached else TrainingData(config)
    clock = StepClock(data)
    with tempfile.TemporaryDirectory(prefix="pbe-timing-") as folder:
        trainer = make_trainer(config, Path(folder), StopSignals(), callbacks=[clock])
        trainer.limit_val_batches = 0
        try:
            trainer.fit(make_task(config, model), datamodule=data)
        finally:
            data.close()
    return clock.ends, clock.waits


def compare_cache(config: Config, warm_up: int, steps: int, rounds: int) -> dict[str, list[Speed]]:
    """Train online and from the cache in turns; returns the rounds of ``online`` and ``cached``.

    Args:
        config: of one device; its ``cache.folder`` is built first when it is not there.
        warm_up: see :func:`time_steps`.
        steps: measured in a round.
        rounds: turns, so that a machine that slows down slows both.
    """
    if warm_up < 1 or steps < 1 or rounds < 1:
        raise UserError("steps, warm-up steps and rounds must be at least 1")
    model, config = random_or_built(config)
    apply_performance_options(model, config.trainer)
    ensure_cache(config, model)
    found: dict[str, list[Speed]] = {"online": [], "cached": []}
    for _ in range(rounds):
        for name, speeds in found.items():
            speeds.append(time_steps(config, model, warm_up, steps, cached=name == "cached"))
    return found


def median(speeds: list[Speed]) -> Speed:
    """Return the medians of several rounds."""
    return Speed(
        statistics.median(speed.samples_per_second for speed in speeds),
        statistics.median(speed.wait_share for speed in speeds),
        statistics.median(speed.step_seconds for speed in speeds),
    )


def measure_step(config: Config, steps: int) -> dict[str, float]:
    """Return the seconds of an optimizer step (the first, and the median of the others) and the peak memory.

    The peak is that of this process so far: ask in a process that has done nothing else.

    Args:
        config: of the run; online.
        steps: after the first one.
    """
    model, config = random_or_built(replace(config, cache=CacheConfig()))
    apply_performance_options(model, config.trainer)
    speed = time_steps(config, model, 1, steps, cached=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": trained, "step_seconds": speed.step_seconds, "peak_gib": peak_memory() / 2**30}


def compare_processes(config: Config, steps: int, root: Path) -> dict[str, float]:
    """Return the samples a second of one process that has one core, and of two processes with DDP.

    Both take the same global batch, ``data.batch_size``, and one thread a process.

    Args:
        config: its ``cache.folder`` is built by the first run; the time of that does not count.
        steps: of each run.
        root: folder of ``train.py``.

    Raises:
        UserError: the machine has one core, the batch is odd, or a run failed.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2 or config.data.batch_size % 2:
        raise UserError("two processes need two cores (on Linux) and an even data.batch_size")
    every = max(steps // 6, 1)
    config = replace(
        quiet(config, steps), logging=replace(config.logging, loggers=["csv"], every=every, grid_every=0)
    )
    config.trainer.threads, config.trainer.validate_every = 1, steps * 10
    found = {}
    with tempfile.TemporaryDirectory(prefix="pbe-timing-") as temporary:
        save_yaml(config, file := Path(temporary) / "run.yaml")
        half = f"data.batch_size={config.data.batch_size // 2}"
        for name, where, options in (
            ("one process, one core", {cores[0]}, ["trainer.devices=1", "trainer.strategy=auto"]),
            ("two processes, two cores", set(cores[:2]), ["trainer.devices=2", "trainer.strategy=ddp", half]),
        ):
            out = Path(temporary) / name.replace(" ", "-")
            _train(root, [str(file), f"output_dir={out}", *options], where)
            rows = read_curve(out / "metrics.csv", "system/samples_per_second")
            found[name] = statistics.median(value for _, value in rows[1:] or rows)
    return found


def _train(root: Path, arguments: list[str], cores: set[int]) -> None:
    """Run train.py on some cores, without validation."""
    command = [sys.executable, "train.py", *arguments, "data.validation_shards="]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"training failed: {done.stderr.strip().splitlines()[-1:]}")
