"""Lightning's trainer, built from the configuration, and refused in one line where it cannot be."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.strategies import StrategyRegistry

from pbe.config import Config, TrainerConfig
from pbe.errors import UserError
from pbe.training.monitoring.loggers import make_loggers
from pbe.training.monitoring.sample_grids import autoencoder_grid, diffusion_grid
from pbe.training.monitoring.step_log import GridCallback, StepLog
from pbe.training.optimization.precision import precision_plugin
from pbe.training.optimization.sharding import STRATEGY_NAMES, ShardedStrategy
from pbe.training.resume.callback import Checkpoints
from pbe.training.resume.files import FOLDER_NAME, SafeCheckpointIO
from pbe.training.resume.signals import StopSignals

OTHER_FILES = ("fsdp", "deepspeed")  # strategies of Lightning's that write checkpoints of their own
# What starts processes by itself hands the trained model back to none of them, or takes other devices.
LEFT_OUT = ("spawn", "fork", "notebook", "xla", "tpu", "single_device")
DEVICES = re.compile(r"auto|-1|[0-9]+|\[?\s*[0-9]+(\s*,\s*[0-9]+)*\s*,?\s*\]?")
PROCESSES = 4  # at most, on the CPU, for each of its cores
# What Lightning raises where settings and machine do not fit.
UNFIT = (
    MisconfigurationException,
    ValueError,
    TypeError,
    RuntimeError,
    ImportError,
    KeyError,
    AssertionError,
)


def make_trainer(
    config: Config,
    folder: Path,
    stop: StopSignals,
    step: int = -1,
    callbacks: list[Callback] | None = None,
) -> pl.Trainer:
    """Build Lightning's trainer with this project's callbacks and loggers.

    Args:
        config: the experiment; where ``trainer.max_epochs`` gives its length, :func:`set_length` comes later.
        folder: of the run.
        stop: says whether a signal came.
        step: optimizer step that the run goes on from, -1 for a start.
        callbacks: others than a run's, which writes nothing then.

    Raises:
        UserError: accelerator, devices, strategy or precision do not fit each other or this machine, a logger
            is unknown or not installed, or the grid's samples cannot be used.
    """
    options, writer = config.trainer, SafeCheckpointIO()
    check_machine(options)
    own = options.strategy in STRATEGY_NAMES or not options.strategy.startswith(OTHER_FILES)
    precision = precision_plugin(options, cpu=on_cpu(options))
    plugins: list[Any] = [
        plugin for plugin in (writer if own else None, precision, cluster()) if plugin is not None
    ]
    loggers = make_loggers(config, folder, step)
    made = _callbacks(config, folder, stop, writer) if callbacks is None else callbacks
    try:
        trainer = pl.Trainer(
            max_steps=options.max_steps or -1,
            max_epochs=-1,
            accelerator=options.accelerator,
            devices=_devices(options.devices),
            num_nodes=options.num_nodes,
            strategy=ShardedStrategy() if options.strategy in STRATEGY_NAMES else options.strategy,
            profiler=options.profiler or None,
            precision=None if precision else options.precision,  # type: ignore[arg-type]
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=config.optimizer.gradient_clip or None,
            val_check_interval=options.validate_every * options.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=loggers,
            callbacks=made,
            enable_checkpointing=callbacks is None,
            plugins=plugins,
            enable_progress_bar=options.progress,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
    except UNFIT as error:
        raise UserError(f"{_machine(options)} do not go together here: {_line(error)}") from error
    global_batch = config.data.batch_size * trainer.world_size
    trainer.limit_val_batches = -(-options.validation_samples // global_batch)
    return trainer


def _callbacks(config: Config, folder: Path, stop: StopSignals, writer: SafeCheckpointIO) -> list[Callback]:
    options = config.trainer
    made: list[Callback] = [
        StepLog(config.logging.every),
        Checkpoints(folder / FOLDER_NAME, options, stop, writer),
    ]
    if options.progress:
        made.append(TQDMProgressBar(refresh_rate=10))
    if config.logging.grid_every:
        source = diffusion_grid(config) if config.task == "diffusion" else autoencoder_grid(config)
        made.append(GridCallback(source, folder, config.logging.grid_every))
    return made


def on_cpu(options: TrainerConfig) -> bool:
    """Say whether training runs on the CPU here."""
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    return options.accelerator == "cpu" or (options.accelerator == "auto" and not found)


def check_machine(options: TrainerConfig) -> None:
    """Check accelerator, devices and strategy by themselves.

    Raises:
        UserError: one of them is unknown or not there; the line says what there is.
    """
    there = [name for name in AcceleratorRegistry if AcceleratorRegistry[name]["accelerator"].is_available()]
    known = ["auto", "gpu", *AcceleratorRegistry]
    if options.accelerator not in known:
        raise UserError(
            f"trainer.accelerator is '{options.accelerator}'; it must be one of {', '.join(known)}"
        )
    if options.accelerator != "auto" and not _is_there(options.accelerator, there):
        raise UserError(
            f"trainer.accelerator is '{options.accelerator}', but this machine has none that torch can use; "
            f"there is: {', '.join(there)}"
        )
    if not DEVICES.fullmatch(options.devices) or _devices(options.devices) == 0:
        raise UserError(
            f"trainer.devices is '{options.devices}'; it must be auto, a number from 1, or a list of GPUs "
            "such as 0,1"
        )
    _check_processes(options)
    strategies = strategy_names()
    if options.strategy not in strategies:
        (nearest,) = difflib.get_close_matches(options.strategy, strategies, n=1, cutoff=0.0)
        raise UserError(
            f"trainer.strategy is '{options.strategy}'; the nearest is '{nearest}', "
            f"of {', '.join(strategies)}"
        )
    if options.strategy in STRATEGY_NAMES and options.precision == "16-mixed":
        raise UserError(
            f"trainer.strategy={options.strategy} cannot scale the gradients of trainer.precision=16-mixed; "
            "use bf16-mixed"
        )


def _check_processes(options: TrainerConfig) -> None:
    """Refuse numbers of processes on the CPU that there cannot be, or that would bring the machine down."""
    devices, most = _devices(options.devices), PROCESSES * (os.cpu_count() or 1)
    if on_cpu(options) and devices != "auto" and not (isinstance(devices, int) and 1 <= devices <= most):
        raise UserError(
            f"trainer.devices is '{options.devices}'; on the CPU it is a number of processes, "
            f"here from 1 to {most}"
        )


def _is_there(accelerator: str, there: list[str]) -> bool:
    return accelerator in there or (accelerator == "gpu" and bool({"cuda", "mps"} & set(there)))


def strategy_names() -> list[str]:
    """Return the values of ``trainer.strategy``."""
    lightnings = [
        name for name in StrategyRegistry.available_strategies() if not any(part in name for part in LEFT_OUT)
    ]
    return ["auto", *lightnings, *STRATEGY_NAMES]


def _devices(text: str) -> int | str | list[int]:
    if text == "auto":
        return text
    numbers = [int(number) for number in re.findall(r"-?[0-9]+", text)]
    return numbers if "," in text or "[" in text else numbers[0]


def cluster() -> ClusterEnvironment | None:
    """Return where the processes of a run come from, or None where Lightning finds that out by itself.

    SLURM's variables stand in every shell of an allocation: they are believed where ``srun`` has started
    several processes, and nowhere else. Nothing is queued again by Lightning: the same command goes on.

    Raises:
        UserError: ``srun`` was told a number of tasks in a way that does not say which node has which.
    """
    given = os.environ
    if TorchElasticEnvironment.detect() or "SLURM_NTASKS" not in given:
        return None
    started = "SLURM_STEP_ID" in given or "SLURM_STEPID" in given
    if not started or given["SLURM_NTASKS"] == "1" or not SLURMEnvironment.detect():
        return LightningEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False)
    except UNFIT as error:
        raise UserError(f"SLURM's variables do not fit: {_line(error)}") from error


def _machine(options: TrainerConfig) -> str:
    names = ("accelerator", "devices", "num_nodes", "strategy", "precision")
    return "trainer." + ", ".join(f"{name}={getattr(options, name)}" for name in names)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def set_length(trainer: pl.Trainer, steps: int) -> None:
    """Make a training so many optimizer steps long."""
    trainer.fit_loop.epoch_loop.max_steps = steps
