"""Finds how large a batch may be, by real optimizer steps on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from pytorch_lightning.utilities.memory import is_oom_error

from pbe.config import Config
from pbe.errors import UserError
from pbe.training.optimization.performance import apply_performance_options
from pbe.training.planning.plan import Stopwatch, find_data, make_steps, on_gpu
from pbe.training.planning.trials import (
    GB,
    MemoryExceededError,
    MemoryWatch,
    Trial,
    available_memory,
    recommend,
    search,
    try_size,
)
from pbe.training.setup import build_model, make_task, prepare_process

SHARE = 0.8  # of the memory that is available
HEAD = f"{'batch size':>10}{'samples a second':>20}{'peak memory':>16}"
# AdamW's moments are there after the first step, and a second one holds everything at once.
WARM_UP, MEASURED = 2, 3


def find_batch_size(
    config: Config, limit_gb: float = 0.0, show: Callable[[str], None] = print
) -> list[Trial]:
    """Try batch sizes on one device of this machine and return the trials; the run's folder stays as it is.

    Args:
        config: the experiment.
        limit_gb: memory limit in GB; 0: 80 % of what is available, or all of a GPU.
        show: takes the table, row by row.
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
    trainer = replace(
        config.trainer,
        accumulate=min(config.trainer.accumulate, 2),
        devices="1",
        num_nodes=1,
        strategy="auto",
        overfit_batches=0,
    )
    return replace(
        config,
        data=replace(config.data, batch_size=size),
        trainer=trainer,
        autoencoder_loss=replace(config.autoencoder_loss, adversarial_start=0),
    )


def measure(config: Config, size: int, limit: int) -> Trial:
    """Make the steps of a batch size; the process ends where they take more memory than ``limit`` bytes.

    Raises:
        MemoryExceededError: the device has no more.
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
