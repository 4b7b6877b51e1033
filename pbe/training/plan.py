"""The plan of a run: its parameters, memory, data and, measured over ten steps, its duration.

How large a batch may be is measured too, by real optimizer steps on one device.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.memory import is_oom_error
from torch import nn

from pbe.config import Config, TrainerConfig
from pbe.data.datamodule import TrainingData
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.exemplar_encoder import MapperAttention
from pbe.models.int8 import named_weights
from pbe.training.activations import activation_bytes
from pbe.training.latent_cache.builder import find_cache, size_on_disk
from pbe.training.latent_cache.dataset import CachedDataModule
from pbe.training.monitoring.callbacks import peak_memory
from pbe.training.resume.signals import StopSignals
from pbe.training.setup import (
    apply_performance_options,
    build_model,
    make_task,
    make_trainer,
    prepare_process,
)
from pbe.training.tasks.base import BaseTask
from pbe.training.tasks.diffusion import DEAD_WITH_ONE_TOKEN, DiffusionTask
from pbe.training.tasks.distillation import DistillationTask
from pbe.training.tasks.finetuning import follow_model
from pbe.training.trials import (
    GB,
    MemoryExceededError,
    MemoryWatch,
    Trial,
    available_memory,
    recommend,
    search,
    try_size,
)

WARM_UP, MEASURED = 2, 10  # optimizer steps
# Of a trial: AdamW's moments are there after the first step, and a second one holds everything at once.
TRIAL_WARM_UP, TRIAL_MEASURED = 2, 3
SHARE = 0.8  # of the memory that is available
HEAD = f"{'batch size':>10}{'samples a second':>20}{'peak memory':>16}"
# Yang et al. 2022, section 4.1: 40 epochs of Open Images. The paper counts 1.9 million images; 1.7 million of
# its training images have boxes, and no other one can be trained on.
PAPER_EPOCHS, PAPER_IMAGES = 40, 1_700_000
DAY, GIB = 86_400.0, 2.0**30


@dataclass(frozen=True)
class Count:
    """Parameters of a network: trained, frozen, and without any influence on the output."""

    trained: int
    frozen: int
    dead: int


def count_parameters(task: BaseTask) -> dict[str, Count]:
    """Count the parameters of each network of a task's model.

    With one condition token the cross-attention's queries, keys and their norm are dead, and so are the
    query and key rows of the mapper's fused weights; with several nothing is.
    """
    model = task.model
    assert isinstance(model, LatentDiffusion)
    encoder, single = model.exemplar_encoder, model.config.exemplar_encoder.tokens == "class"
    tower = {id(p) for p in encoder.tower.parameters()}
    names = DEAD_WITH_ONE_TOKEN if single else ()
    dead = {id(p) for name, p in named_weights(model.unet) if any(part in name for part in names)}
    fused = [module.qkv for module in encoder.modules() if isinstance(module, MapperAttention) and single]
    idle_rows = sum(2 * p.numel() // 3 for layer in fused for p in (layer.weight, layer.bias))
    learning = any(layer.weight.requires_grad for layer in fused)  # beside adapters they do not

    def count(module: nn.Module, idle: int = 0, beside: Iterable[int] = ()) -> Count:
        trained = frozen = lost = 0
        for p in (p for _, p in named_weights(module) if id(p) not in beside):
            if id(p) in dead:
                lost += p.numel()
            elif p.requires_grad:
                trained += p.numel()
            else:
                frozen += p.numel()
        return Count(trained - idle * learning, frozen - idle * (not learning), lost + idle)

    return {
        "UNet": count(model.unet),
        "bottleneck": count(encoder, idle_rows, tower),
        "image tower": count(encoder.tower),
        "autoencoder": count(model.autoencoder),
    }


def state_bytes(task: BaseTask) -> dict[str, int]:
    """Return the bytes on a device of weights, teacher, gradients, moments and moving average."""
    sizes = [(p.numel(), p.element_size(), p.requires_grad) for _, p in named_weights(task.model)]
    trained = sum(count for count, _, learns in sizes if learns)
    gradients = sum(count * size for count, size, learns in sizes if learns)
    beside: dict[str, int] = {}
    if isinstance(task, DistillationTask) and not task.adapted:
        copied = task.teacher.unet.parameters()
        beside["teacher"] = sum(p.numel() * p.element_size() for p in copied)
    return {
        "weights": sum(count * size for count, size, _ in sizes),
        "gradients": gradients,
        **beside,
        "moments": (1 if task.config.optimizer.name == "muon" else 2) * gradients,
        "moving average": 4 * trained if task.ema is not None else 0,
    }


class Stopwatch(pl.Callback):
    """Times ``measured`` optimizer steps after ``warm_up`` others; ``seconds`` is 0 before they are over."""

    def __init__(self, warm_up: int = WARM_UP, measured: int = MEASURED) -> None:
        self.warm_up, self.measured = warm_up, measured
        self.seconds = self._start = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start and stop."""
        if trainer.global_step == self.warm_up and not self._start:
            self._start = time.perf_counter()
        if trainer.global_step == self.warm_up + self.measured:
            self.seconds = time.perf_counter() - self._start


def make_plan(config: Config) -> Iterator[str]:
    """Yield the lines of a run's plan, the measured ones last; nothing is written into its folder.

    Nothing is measured where gradients, moments, average and activations would not fit into the CPU's memory.
    What kernels take for a moment is not known: such a plan may be cut short after what is counted. Data and
    an autoencoder that are not there yet are no error here.
    """
    prepare_process(config)
    notes: list[str] = []
    try:
        model, config = build_model(config)
    except UserError as error:
        notes.append(f"random weights: {error}")
        if config.model_from_init:
            config = follow_model(config, config.model)
        model = LatentDiffusion(config.model)
    options = config.trainer
    apply_performance_options(model, replace(options, compile=False))
    task = make_task(config, model)
    kept = _activations(task)
    yield from _tables(task, kept)
    if options.compile:  # which what has no numbers cannot pass through
        apply_performance_options(model, TrainerConfig(compile=True))
    data = find_data(config, task, notes)
    yield from (f"note: {note}" for note in notes)
    if data is None:
        yield "no data, so nothing is measured"
        return
    yield from _length(config, data)
    if lacking := _memory_lacking(config, task, kept):
        yield f"not measured: {lacking}"
    else:
        yield from _duration(config, task, data)


def on_gpu(config: Config) -> bool:
    """Return whether a configuration trains on CUDA here."""
    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def _activations(task: BaseTask) -> int:
    """Return the bytes that a micro-batch keeps for its backward pass; 0 where they are not counted."""
    if not isinstance(task, DiffusionTask):
        return 0
    return activation_bytes(task, "cuda" if on_gpu(task.config) else "cpu")


def _memory_lacking(config: Config, task: BaseTask, kept: int) -> str:
    """Return what does not fit into the memory that a CPU has left beside the weights; empty if all does."""
    sizes = state_bytes(task)
    needed, free = sum(sizes.values()) - sizes["weights"] + kept, available_memory()
    if on_gpu(config) or needed <= free:
        return ""
    return f"beside the weights training holds {needed / GIB:.2f} GiB, and {free / GIB:.2f} GiB are free"


def _tables(task: BaseTask, kept: int) -> Iterator[str]:
    yield f"{'parameters':<14}{'trained':>16}{'frozen':>16}{'dead':>16}"
    for name, count in count_parameters(task).items():
        yield f"{name:<14}{count.trained:>16,}{count.frozen:>16,}{count.dead:>16,}"
    sizes = state_bytes(task)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size)
    total, batch = sum(sizes.values()) / GIB, task.config.data.batch_size
    yield from ["", f"memory on each device: {total:.2f} GiB ({parts})"]
    yield f"{kept / GIB:.2f} GiB of activations of {batch} samples on top" if kept else "activations on top"
    yield ""


def find_data(config: Config, task: BaseTask, notes: list[str]) -> TrainingData | None:
    """Return what training would read, cached or not; None, and a note of why, where it is not there."""
    model = task.model
    assert isinstance(model, LatentDiffusion)
    try:
        data = TrainingData(config)
        data.samples("train")
        if config.task == "autoencoder" or not config.cache.folder:
            return data
        if (store := find_cache(config, model)) is not None:
            return CachedDataModule(config, store)
        size = size_on_disk(config, model).total / GIB
        notes.append(f"the latent cache is not built yet ({size:.2f} GiB); measured without it")
        return data
    except UserError as error:
        notes.append(str(error))
        return None


def _short_trainer(config: Config, folder: Path, watch: Stopwatch) -> pl.Trainer:
    steps = watch.warm_up + watch.measured
    short = replace(config.trainer, max_steps=steps, max_epochs=0, progress=False, profiler="")
    quiet = replace(config, trainer=short, logging=replace(config.logging, loggers=[], grid_every=0))
    return make_trainer(quiet, folder, StopSignals(), callbacks=[watch])


def make_steps(config: Config, task: BaseTask, data: TrainingData, watch: Stopwatch) -> pl.Trainer:
    """Make the steps that a stopwatch times, without validation or files, and return their trainer."""
    with tempfile.TemporaryDirectory(prefix="pbe-steps-") as folder:
        trainer = _short_trainer(config, Path(folder), watch)
        trainer.limit_val_batches = 0
        try:
            trainer.fit(task, datamodule=data)
        finally:
            data.close()
    return trainer


def _length(config: Config, data: TrainingData) -> list[str]:
    """Count samples, steps and epochs: what ``trainer.max_steps`` or ``max_epochs`` comes to."""
    with tempfile.TemporaryDirectory(prefix="pbe-plan-") as folder:
        world = _short_trainer(config, Path(folder), Stopwatch()).world_size
    step = config.data.batch_size * world * config.trainer.accumulate
    epoch, steps = data.steps_of_epochs(1, world), data.steps_of_run(world)
    return [
        f"samples: {data.length:,} an epoch, {step} a step; {epoch:,} steps an epoch",
        f"length: {steps:,} steps, {steps / epoch:,.2f} epochs",
    ]


def _duration(config: Config, task: BaseTask, data: TrainingData) -> list[str]:
    watch = Stopwatch()
    trainer = make_steps(config, task, data, watch)
    step = config.data.batch_size * trainer.world_size * config.trainer.accumulate
    steps, samples = data.steps_of_run(trainer.world_size), data.length
    speed = MEASURED * step / watch.seconds
    return [
        f"speed: {speed:.2f} samples a second over {MEASURED} steps on {trainer.world_size} device(s), "
        f"peak memory {peak_memory() / GIB:.2f} GiB",
        f"this run: {steps:,} steps, {steps * step / speed / 3600:.1f} hours",
        f"{PAPER_EPOCHS} epochs of these samples: {PAPER_EPOCHS * samples / speed / DAY:.2f} days",
        f"{PAPER_EPOCHS} epochs of Open Images' {PAPER_IMAGES / 1e6:.1f} million images with boxes: "
        f"{PAPER_EPOCHS * PAPER_IMAGES / speed / DAY:.1f} days",
    ]


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
    accumulate = min(config.trainer.accumulate, 2)
    trainer = replace(
        config.trainer, accumulate=accumulate, devices="1", num_nodes=1, strategy="auto", overfit_batches=0
    )
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
    watch = Stopwatch(TRIAL_WARM_UP, TRIAL_MEASURED)
    accumulate, length = config.trainer.accumulate, data.length
    make_steps(config, task, data, watch)
    return Trial(
        size=config.data.batch_size,
        fits=True,
        samples_per_second=TRIAL_MEASURED * config.data.batch_size * accumulate / watch.seconds,
        largest=length // accumulate,
        note=notes[-1] if notes else "",
    )
