"""A few optimizer steps with one batch size, as they would be made in the run."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from pytorch_lightning.utilities.memory import is_oom_error

from pbe.config import Config
from pbe.errors import UserError
from pbe.training.optimization.performance import make_fast
from pbe.training.planning.batch_size import MemoryExceededError, Trial, end_above, on_gpu, peak_of_process
from pbe.training.planning.plan import Stopwatch, find_data
from pbe.training.resume.signals import StopSignals
from pbe.training.run import prepare_process
from pbe.training.setup import build_model, make_task
from pbe.training.trainer import make_trainer

# AdamW's moments are there after the first step, and a second one holds everything at once.
WARM_UP, MEASURED = 2, 3


def trial_config(config: Config, size: int) -> Config:
    """Return the configuration of a trial: one device, few steps, and whatever begins later begins at once.

    Of accumulation two micro-batches are left: with them gradients are there while activations are.
    """
    trainer = replace(
        config.trainer,
        max_steps=WARM_UP + MEASURED,
        max_epochs=0,
        accumulate=min(config.trainer.accumulate, 2),
        devices="1",
        num_nodes=1,
        strategy="auto",
        progress=False,
        profiler="",
        overfit_batches=0,
    )
    return replace(
        config,
        data=replace(config.data, batch_size=size),
        trainer=trainer,
        logging=replace(config.logging, loggers=[], grid_every=0),
        autoencoder_loss=replace(config.autoencoder_loss, adversarial_start=0),
    )


def measure(config: Config, size: int, limit: int) -> Trial:
    """Make the steps of a batch size; the process ends where they take more memory than ``limit`` bytes.

    Raises:
        MemoryExceededError: the device has no more.
        UserError: as the run itself would.
    """
    gpu = on_gpu(config)
    if gpu and limit:
        share = limit / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    elif limit:
        end_above(limit)
    try:
        return _steps(trial_config(config, size), gpu)
    except RuntimeError as error:
        if not is_oom_error(error):
            raise
        raise MemoryExceededError from error


def _steps(config: Config, gpu: bool) -> Trial:
    prepare_process(config)
    model, config = build_model(config)
    make_fast(model, config.trainer)
    task = make_task(config, model)
    notes: list[str] = []
    data = find_data(config, task, notes)
    if data is None:
        raise UserError(notes[-1])
    watch = Stopwatch(WARM_UP, MEASURED)
    samples = config.data.batch_size * config.trainer.accumulate
    length = len(data.samples("train"))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="pbe-batch-") as folder:
        trainer = make_trainer(config, Path(folder), StopSignals(), callbacks=[watch])
        trainer.limit_val_batches = 0
        try:
            trainer.fit(task, datamodule=data)
        finally:
            data.close()
    return Trial(
        size=config.data.batch_size,
        fits=True,
        samples_per_second=MEASURED * samples / watch.seconds,
        peak=torch.cuda.max_memory_allocated() if gpu else peak_of_process(),
        largest=length // config.trainer.accumulate,
        note=notes[-1] if notes else "",
    )
