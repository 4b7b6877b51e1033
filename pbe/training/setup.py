"""Builds the model, the task and Lightning's trainer of a configuration, and refuses what does not fit."""

from __future__ import annotations

import difflib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from pytorch_lightning.plugins.precision import HalfPrecision, MixedPrecision, Precision
from pytorch_lightning.strategies import StrategyRegistry

from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.native import CONFIG_NAME, load_config as load_model_config, load_part
from pbe.checkpoints.tower_weights import load_tower_weights
from pbe.config import AutoencoderConfig, Config, ModelConfig, TrainerConfig, differences, flatten, to_dict
from pbe.config.loading import one_line
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.image_tower import follow_sizes
from pbe.models.layers import compile_network
from pbe.training.activations import checkpoint_blocks
from pbe.training.monitoring.callbacks import GridCallback, StepLog, autoencoder_grid, diffusion_grid
from pbe.training.monitoring.loggers import make_loggers
from pbe.training.optimization.sharding import STRATEGY_NAMES, ShardedStrategy
from pbe.training.resume.callback import Checkpoints
from pbe.training.resume.files import FOLDER_NAME, SafeCheckpointIO, report
from pbe.training.resume.signals import StopSignals
from pbe.training.tasks.autoencoder import AutoencoderTask
from pbe.training.tasks.base import BaseTask
from pbe.training.tasks.diffusion import DiffusionTask
from pbe.training.tasks.distillation import DistillationTask
from pbe.training.tasks.finetuning import check_undistilled, follow_model, undistilled

# Lightning's advice that does not apply here: few workers for small images, a frozen tower, no validation,
# a place in the data that the data module restores, and a library's own housekeeping.
NEEDLESS_ADVICE = (
    "does not have many workers",
    r"module\(s\) in eval mode",
    "You have overridden `transfer_batch_to_device`",
    "your dataloader is not resumable",
    "is smaller than the logging interval",
    r"Total length of .* across ranks is zero",  # a run without validation shards
    "It is recommended to use `self.log",
    r"`isinstance\(treespec, LeafSpec\)`",
)
# Of the model section: what shapes no weight, where the configuration decides and init_from does not.
OWN = ("image_size", "prediction", "schedule")
OWN_OF_ENCODER = ("tokens", "token_grid", "mean", "std")

TASKS = {"diffusion": DiffusionTask, "distillation": DistillationTask, "autoencoder": AutoencoderTask}
OTHER_FILES = ("fsdp", "deepspeed")  # strategies of Lightning's that write checkpoints of their own
# What starts processes by itself hands the trained model back to none of them, or takes other devices.
LEFT_OUT = ("spawn", "fork", "notebook", "xla", "tpu", "single_device")
DEVICES = re.compile(r"auto|-1|[0-9]+|\[?\s*[0-9]+(\s*,\s*[0-9]+)*\s*,?\s*\]?")
MAX_PROCESSES = 4  # on the CPU, for each of its cores
# What Lightning raises where settings and machine do not fit.
MISFIT = (
    MisconfigurationException,
    ValueError,
    TypeError,
    RuntimeError,
    ImportError,
    KeyError,
    AssertionError,
)


def prepare_process(config: Config) -> None:
    """Set threads, seeds and logging of this process, and fill in the sizes that follow from the tower."""
    follow_sizes(config)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    pl.seed_everything(config.seed, verbose=False)
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pbe").setLevel(logging.INFO)
    for message in NEEDLESS_ADVICE:
        warnings.filterwarnings("ignore", message=f".*{message}")


def build_model(config: Config) -> tuple[LatentDiffusion, Config]:
    """Build the model with the weights that its training starts from.

    ``init_from`` gives all weights, in any layout; else the tower is pretrained and, for diffusion, the
    autoencoder and its scale factor come from ``autoencoder_from``. The configuration is returned with the
    autoencoder's section as it was trained.
    """
    if config.start:
        return _warm_started(config)
    diffusion, loss, source = config.task == "diffusion", config.autoencoder_loss, Path()
    if diffusion:
        source, trained = find_autoencoder(config)
        config = replace(config, model=replace(config.model, autoencoder=trained))
    torch.manual_seed(config.seed)
    model = LatentDiffusion(config.model)
    if diffusion:
        load_part(source, "autoencoder", model.autoencoder)
    if diffusion and not config.init_from:
        print("init_from is empty: the UNet starts from random weights (init_from=none says that it shall)")
    if diffusion or (loss.perceptual_weight and loss.perceptual_on == "tower"):
        print(load_tower_weights(model.exemplar_encoder.tower, config.model.exemplar_encoder))
    return model, config


def find_autoencoder(config: Config) -> tuple[Path, AutoencoderConfig]:
    """Return the model folder that ``autoencoder_from`` means (``model/`` of a run), and the sizes there."""
    if not config.autoencoder_from:
        raise UserError("autoencoder_from is empty: name the model folder that holds the trained autoencoder")
    source = Path(config.autoencoder_from)
    if not source.exists():
        raise UserError(
            f"autoencoder_from is '{source}', which does not exist; name the folder of a trained "
            "autoencoder, or toy, the one that ships"
        )
    if not (source / CONFIG_NAME).is_file() and (source / "model" / CONFIG_NAME).is_file():
        source = source / "model"
    return source, load_model_config(source).autoencoder


def _warm_started(config: Config) -> tuple[LatentDiffusion, Config]:
    """Build the model with all weights of ``init_from``."""
    if not Path(config.start).exists():
        raise UserError(
            f"init_from is '{config.start}', which does not exist; name a model folder or a checkpoint; "
            "init_from=none trains from random weights"
        )
    if config.task == "distillation":  # the configuration that a run leaves has the student's sizes
        config = replace(config, model=replace(config.model, unet=undistilled(config.model.unet)))
    # a folder tells its sizes, a bare checkpoint is taken for this run's
    sizes = None if Path(config.start).is_dir() or config.model_from_init else config.model
    opened = open_checkpoint(config.start, sizes)
    if config.model_from_init:
        config = follow_model(config, opened.config)
    merged, wanted = _merged(config, opened.config), config.model
    model = replace(opened, config=merged).read(torch.float32).requires_grad_(True)
    encoder, autoencoder = model.exemplar_encoder, model.autoencoder
    if wanted.autoencoder.mask_aware_decoder and not merged.autoencoder.mask_aware_decoder:
        torch.manual_seed(config.seed)
        autoencoder.make_mask_aware()
    if wanted.exemplar_encoder.layout_grid and not merged.exemplar_encoder.layout_grid:
        torch.manual_seed(config.seed)
        encoder.add_layout_pooling(wanted.exemplar_encoder)
    model.config = replace(model.config, autoencoder=autoencoder.config, exemplar_encoder=encoder.config)
    return model, replace(config, model=model.config)


def _merged(config: Config, stored: ModelConfig) -> ModelConfig:
    """Return the stored sizes with what the configuration decides; other differences are an error."""
    wanted = config.model
    own = {name: getattr(wanted.exemplar_encoder, name) for name in OWN_OF_ENCODER}
    encoder, autoencoder = replace(stored.exemplar_encoder, **own), stored.autoencoder
    merged = replace(stored, exemplar_encoder=encoder, **{name: getattr(wanted, name) for name in OWN})
    # stored scale factor and tower weights win; a plain decoder may be made mask-aware, and a pooling added
    aware = autoencoder.mask_aware_decoder or wanted.autoencoder.mask_aware_decoder
    scale = wanted.autoencoder.scale_factor
    untrained = config.lora.rank or "mapper" not in (config.optimizer.parts or ["mapper"])
    adds = config.task == "diffusion" and not (untrained or encoder.layout_grid)
    taken_over = ("pretrained", *(("layout_grid", "layout_width") if adds else ()))
    taken = replace(
        merged,
        autoencoder=replace(autoencoder, scale_factor=scale, mask_aware_decoder=aware),
        exemplar_encoder=replace(
            encoder, **{name: getattr(wanted.exemplar_encoder, name) for name in taken_over}
        ),
    )
    if different := _model_differences(wanted, taken):
        raise UserError(
            "the model section of the configuration differs from that of init_from "
            f"'{config.start}': {'; '.join(different)}; make them equal"
        )
    if changed := _model_differences(merged, stored):
        report(f"training starts from '{config.start}' with {'; '.join(changed)}")
    return merged


def _model_differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    changed = differences(flatten(to_dict(theirs), "model."), flatten(to_dict(ours), "model."))
    return [f"{key} {new} instead of {old}" for key, (old, new) in changed.items()]


def apply_performance_options(model: LatentDiffusion, options: TrainerConfig) -> None:
    """Apply ``gradient_checkpointing``, ``channels_last`` and ``compile`` in place; weights stay."""
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if options.gradient_checkpointing:
        checkpoint_blocks(model)
    if options.compile:
        for network in (model.unet, model.autoencoder.encoder):
            compile_network(network, "trainer.compile")


class PureBfloat16(HalfPrecision):
    """All weights in bfloat16, frozen ones included; the networks' inputs are converted where they are used.

    Latents, noise, targets and losses stay float32: Lightning would convert the batch, which is uint8 or a
    frozen dataclass, and everything that is made in a step.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Leave torch's default type as it is."""
        yield

    def convert_input(self, data: Any) -> Any:
        """Leave a batch as it is."""
        return data


def precision_plugin(options: TrainerConfig, *, cpu: bool) -> Precision | None:
    """Return the plugin of ``trainer.precision``, or None where Lightning's own is right.

    On the CPU Lightning would take bf16-mixed in place of 16-mixed.
    """
    if options.precision == "bf16-true":
        return PureBfloat16()
    if options.precision == "16-mixed" and cpu:
        return MixedPrecision("16-mixed", "cpu")
    return None


def make_task(config: Config, model: LatentDiffusion) -> BaseTask:
    """Return the task that a configuration names, over a model."""
    if config.task != "autoencoder":
        check_undistilled(model, config)
    return TASKS[config.task](config, model)


def make_trainer(
    config: Config, folder: Path, stop: StopSignals, step: int = -1, callbacks: list[Callback] | None = None
) -> pl.Trainer:
    """Build Lightning's trainer with this project's callbacks and loggers.

    Where ``trainer.max_epochs`` gives the length, the caller sets it later. The run resumes from optimizer
    step ``step``, -1 for a start. ``callbacks`` come in place of a run's own; then nothing is written.
    """
    options, writer = config.trainer, SafeCheckpointIO()
    check_machine(options)
    sharded = options.strategy in STRATEGY_NAMES
    own = sharded or not options.strategy.startswith(OTHER_FILES)
    precision = precision_plugin(options, cpu=on_cpu(options))
    wanted = (writer if own else None, precision, cluster())
    plugins: list[Any] = [plugin for plugin in wanted if plugin is not None]
    loggers = make_loggers(config, folder, step)
    made = _callbacks(config, folder, stop, writer) if callbacks is None else callbacks
    try:
        trainer = pl.Trainer(
            max_steps=options.max_steps or -1,
            max_epochs=-1,
            accelerator=options.accelerator,
            devices=_devices(options.devices),
            num_nodes=options.num_nodes,
            strategy=ShardedStrategy() if sharded else options.strategy,
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
    except MISFIT as error:
        names = ("accelerator", "devices", "num_nodes", "strategy", "precision")
        machine = ", ".join(f"{name}={getattr(options, name)}" for name in names)
        raise UserError(f"trainer.{machine} do not work together here: {one_line(error)}") from error
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
        source = autoencoder_grid(config) if config.task == "autoencoder" else diffusion_grid(config)
        made.append(GridCallback(source, folder, config.logging.grid_every))
    return made


def on_cpu(options: TrainerConfig) -> bool:
    """Return whether training runs on the CPU here."""
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    return options.accelerator == "cpu" or (options.accelerator == "auto" and not found)


def check_machine(options: TrainerConfig) -> None:
    """Check that accelerator, devices and strategy are known and there, each by itself."""
    there = [name for name in AcceleratorRegistry if AcceleratorRegistry[name]["accelerator"].is_available()]
    known = ["auto", "gpu", *AcceleratorRegistry]
    if options.accelerator not in known:
        raise UserError(
            f"trainer.accelerator is '{options.accelerator}'; it must be one of {', '.join(known)}"
        )
    found = options.accelerator in there or (options.accelerator == "gpu" and {"cuda", "mps"} & {*there})
    if options.accelerator != "auto" and not found:
        raise UserError(
            f"trainer.accelerator is '{options.accelerator}', but this machine has none that torch can use; "
            f"there is: {', '.join(there)}"
        )
    _check_devices(options)
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


def _check_devices(options: TrainerConfig) -> None:
    """Check the devices; on the CPU, more processes than it can carry would bring the machine down."""
    if not DEVICES.fullmatch(options.devices) or _devices(options.devices) == 0:
        raise UserError(
            f"trainer.devices is '{options.devices}'; it must be auto, a number from 1, or a list of GPUs "
            "such as 0,1"
        )
    devices, most = _devices(options.devices), MAX_PROCESSES * (os.cpu_count() or 1)
    if on_cpu(options) and devices != "auto" and not (isinstance(devices, int) and 1 <= devices <= most):
        raise UserError(
            f"trainer.devices is '{options.devices}'; on the CPU it is a number of processes, "
            f"here from 1 to {most}"
        )


def strategy_names() -> list[str]:
    """Return the values of ``trainer.strategy``."""
    known = StrategyRegistry.available_strategies()
    lightnings = [name for name in known if not any(part in name for part in LEFT_OUT)]
    return ["auto", *lightnings, *STRATEGY_NAMES]


def _devices(text: str) -> int | str | list[int]:
    if text == "auto":
        return text
    numbers = [int(number) for number in re.findall(r"-?[0-9]+", text)]
    return numbers if "," in text or "[" in text else numbers[0]


def cluster() -> ClusterEnvironment | None:
    """Return the environment that started the processes, or None where Lightning finds it by itself.

    SLURM's variables stand in every shell of an allocation: they are believed where ``srun`` has started
    several processes, and nowhere else. Lightning requeues nothing: the same command resumes.
    """
    given = os.environ
    if TorchElasticEnvironment.detect() or "SLURM_NTASKS" not in given:
        return None
    started = "SLURM_STEP_ID" in given or "SLURM_STEPID" in given
    if not started or given["SLURM_NTASKS"] == "1" or not SLURMEnvironment.detect():
        return LightningEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False)
    except MISFIT as error:  # a number of tasks that does not tell which node has which
        raise UserError(f"SLURM's variables do not fit: {one_line(error)}") from error
