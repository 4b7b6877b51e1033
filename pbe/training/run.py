"""Run a configuration: build the model, train it, export its weights."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.utilities.exceptions import SIGTERMException

from pbe.checkpoints.layout import empty_model
from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.native import (
    check_keys,
    load_config as load_model_config,
    load_part,
    save_model,
)
from pbe.checkpoints.opened import build
from pbe.checkpoints.tower_files import load_tower_weights
from pbe.config import Config, ModelConfig, save_yaml
from pbe.data.datamodule import ExemplarDataModule
from pbe.errors import UserError
from pbe.files import make_folder
from pbe.models import LatentDiffusion
from pbe.models.tower_facts import follow_sizes
from pbe.training.autoencoder_task import AutoencoderTask, measure_scale_factor
from pbe.training.base_task import BaseTask
from pbe.training.cache_builder import ensure_cache
from pbe.training.cache_listing import describe_folder
from pbe.training.cache_size import CacheSize, size_on_disk
from pbe.training.callbacks import GridCallback, StepLog
from pbe.training.checkpoint_callback import Checkpoints
from pbe.training.checkpointing import (
    FOLDER_NAME,
    SafeCheckpointIO,
    changed_settings,
    find_checkpoint,
    read_checkpoint,
    say,
    step_of,
)
from pbe.training.data import TrainingData
from pbe.training.diffusion_task import DiffusionTask
from pbe.training.grids import autoencoder_grid, diffusion_grid
from pbe.training.latent_cache import CachedDataModule
from pbe.training.loggers import CsvLog, close_loggers, make_loggers
from pbe.training.sharding import STRATEGY_NAMES, ShardedStrategy, on_the_cpu
from pbe.training.speed import make_fast
from pbe.training.stopping import StopSignals, TrainingStopped

SCALE_BATCHES = 8
OTHER_FILES = ("fsdp", "deepspeed")  # strategies of Lightning's that write checkpoints of their own
# What Lightning says of things that are meant to be so: few workers for small pictures, a frozen tower,
# a place in the data that the data module restores, and a library's own housekeeping.
NEEDLESS_ADVICE = (
    "does not have many workers",
    r"module\(s\) in eval mode",
    "You have overridden `transfer_batch_to_device`",
    "your dataloader is not resumable",
    "is smaller than the logging interval",
    "It is recommended to use `self.log",
    r"`isinstance\(treespec, LeafSpec\)`",
)


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind.

    Attributes:
        output_dir: of the run: ``config.yaml``, ``metrics.csv``, ``checkpoints/``, ``grids/``, ``model/``.
        model_dir: averaged weights in the native layout; they exist when the run reached its last step.
        steps: optimizer steps made since the very start.
        seconds: wall time of this call.
        stopped_by: number of the signal that ended it early, or 0.
        rank: of this process; 0 speaks for all.
    """

    output_dir: Path
    model_dir: Path
    steps: int
    seconds: float
    stopped_by: int
    rank: int = 0


def train(config: Config) -> TrainResult:
    """Train as configured, from the newest checkpoint when ``trainer.resume`` says so.

    Args:
        config: the experiment; see ``configs/``.

    Raises:
        UserError: bad paths, a cache of other settings, unusable data, or a run that would be overwritten.
    """
    started = time.monotonic()
    prepare_process(config)
    folder, stop = Path(config.output_dir), StopSignals()
    checkpoint = find_checkpoint(config)
    begun = step_of(checkpoint)
    make_folder(folder)
    with stop.listening():
        model, config = build_model(config)
        trainer = make_trainer(config, folder, stop, begun)
        make_fast(model, config.trainer)
        task = make_task(config, model)
        if checkpoint is not None:
            check_checkpoint(checkpoint, task)
        finished = _run(trainer, task, checkpoint, stop)
    seconds, steps = time.monotonic() - started, max(trainer.global_step, begun, 0)
    stopped_by = 0 if finished else stop.received
    return TrainResult(folder, folder / "model", steps, seconds, stopped_by, trainer.global_rank)


def _run(trainer: pl.Trainer, task: BaseTask, checkpoint: Path | None, stop: StopSignals) -> bool:
    """Train, validate and export; returns whether the run came to its end."""
    config, data = task.config, None
    folder = Path(config.output_dir)
    try:
        data = _data(config, task, trainer, stop)
        if trainer.is_global_zero:
            save_yaml(config, folder / "config.yaml")
        _fit(trainer, task, data, checkpoint, stop)
        if stop.received:
            return False
        _validate(trainer, task, data)
        _export(task, config, folder / "model", writes=trainer.is_global_zero)
        return True
    except (TrainingStopped, SIGTERMException):  # Lightning's comes for a signal before the first batch
        return False
    finally:
        close_loggers(trainer.loggers)
        if data is not None:
            data.close()


def _fit(
    trainer: pl.Trainer, task: BaseTask, data: TrainingData, checkpoint: Path | None, stop: StopSignals
) -> None:
    """Train to the end or to a signal, with a validation before the first step."""
    step = step_of(checkpoint)
    for logger in trainer.loggers:
        if isinstance(logger, CsvLog):
            logger.cut(step)
    if step <= 0 or step % task.config.trainer.validate_every == 0:
        _validate(trainer, task, data, checkpoint)
    stop.check()
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=False)


def make_task(config: Config, model: LatentDiffusion) -> BaseTask:
    """Return the task that a configuration names, over a model."""
    return DiffusionTask(config, model) if config.task == "diffusion" else AutoencoderTask(config, model)


def build_cache(config: Config, share: tuple[int, int] = (0, 1)) -> int:
    """Build the latent cache of a configuration, or part ``i`` of ``n`` of it (from 0).

    Returns:
        The signal that stopped it, or 0.
    """
    prepare_process(config)
    stop = StopSignals()
    with stop.listening():
        model, config = build_model(config)
        if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
            model.to("cuda")
        try:
            ensure_cache(config, model, check=stop.check, share=share)
        except TrainingStopped:
            return stop.received
    return 0


def cache_size(config: Config) -> CacheSize:
    """Return what the latent cache of a configuration takes when it is built; no weights are needed."""
    trained = Path(config.autoencoder_from)
    if config.autoencoder_from and trained.is_dir() and not config.init_from:
        autoencoder = load_model_config(trained).autoencoder
        config = replace(config, model=replace(config.model, autoencoder=autoencoder))
    with torch.device("meta"):
        model = LatentDiffusion(config.model)
    return size_on_disk(config, model)


def cache_list(config: Config) -> list[str]:
    """Return a line for everything in the folder of a latent cache: what it is, and whether it fits."""
    prepare_process(config)
    model, config = build_model(config)
    return describe_folder(config, model)


def check_checkpoint(path: Path, task: BaseTask) -> None:
    """Check that a checkpoint continues this very task, and say which settings are others now.

    Raises:
        UserError: it is damaged, of a model of other sizes, or lacks the moving average that is asked for.
    """
    content = read_checkpoint(path)
    check_keys(content["state_dict"], task, f"checkpoint '{path}'")
    if task.ema is not None and not content["ema"]:
        raise UserError(
            f"'{path}' was trained without a moving average; set optimizer.ema_decay=0 or another output_dir"
        )
    changed = changed_settings(content["config"], task.config) if content["config"] else []
    if changed:
        step = content["global_step"]
        say(f"going on from step {step} of '{path}' with changed settings: {'; '.join(changed)}")


def _validate(
    trainer: pl.Trainer, task: BaseTask, data: TrainingData, checkpoint: Path | None = None
) -> None:
    """Validate unless these very weights have been (the run may have been stopped right after it)."""
    step = max(trainer.global_step, step_of(checkpoint))
    logs = [logger for logger in trainer.loggers if isinstance(logger, CsvLog)]
    if task.validated_step != step and not any(log.has(step, "val/loss") for log in logs):
        trainer.validate(task, datamodule=data, ckpt_path=checkpoint, verbose=False, weights_only=False)


def prepare_process(config: Config) -> None:
    """Set threads, seeds and what is said on stderr, and fill in what follows the tower."""
    follow_sizes(config)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    pl.seed_everything(config.seed, verbose=False)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pbe").setLevel(logging.INFO)
    for message in NEEDLESS_ADVICE:
        warnings.filterwarnings("ignore", message=f".*{message}")


def build_model(config: Config) -> tuple[LatentDiffusion, Config]:
    """Build the model with the weights that its training starts from.

    ``init_from`` gives all weights, in any layout; else the tower is pretrained and, for diffusion, the
    autoencoder and its scale factor come from ``autoencoder_from``.

    Returns:
        The model, and the configuration with the autoencoder's section as it was trained.
    """
    if config.init_from:
        # a folder says its sizes, a bare checkpoint is taken for this run's
        sizes = None if Path(config.init_from).is_dir() else config.model
        opened = open_checkpoint(config.init_from, sizes)
        # how many tokens the tower gives shapes no weight, so that a bottleneck can be opened or closed
        wanted = config.model.exemplar_encoder
        encoder = replace(opened.config.exemplar_encoder, tokens=wanted.tokens, token_grid=wanted.token_grid)
        opened = replace(opened, config=replace(opened.config, exemplar_encoder=encoder))
        model = build(opened, torch.float32).requires_grad_(True)
        _add_branch(config, model)
        _check_same_model(config, model.config)
        return model, replace(config, model=model.config)
    if config.task == "autoencoder":
        torch.manual_seed(config.seed)
        return LatentDiffusion(config.model), config
    if not config.autoencoder_from:
        raise UserError("autoencoder_from is empty: name the model folder that holds the trained autoencoder")
    source = Path(config.autoencoder_from)
    trained = load_model_config(source).autoencoder
    config = replace(config, model=replace(config.model, autoencoder=trained))
    torch.manual_seed(config.seed)
    model = LatentDiffusion(config.model)
    load_part(source, "autoencoder", model.autoencoder)
    print(load_tower_weights(model.exemplar_encoder.tower, config.model.exemplar_encoder))
    return model, config


def _add_branch(config: Config, model: LatentDiffusion) -> None:
    """Make a decoder mask-aware that was not, where the configuration wants it to be."""
    if config.model.autoencoder.mask_aware_decoder and not model.config.autoencoder.mask_aware_decoder:
        torch.manual_seed(config.seed)
        model.autoencoder.make_mask_aware()
        model.config = replace(model.config, autoencoder=model.autoencoder.config)


def _check_same_model(config: Config, stored: ModelConfig) -> None:
    """Refuse ``init_from`` a model of another shape; the stored scale factor and tower weights win."""
    autoencoder = replace(config.model.autoencoder, scale_factor=stored.autoencoder.scale_factor)
    encoder = replace(config.model.exemplar_encoder, pretrained=stored.exemplar_encoder.pretrained)
    if replace(config.model, autoencoder=autoencoder, exemplar_encoder=encoder) != stored:
        raise UserError(
            f"the model section of the configuration differs from that of init_from '{config.init_from}'; "
            "make them equal"
        )


def _data(config: Config, task: BaseTask, trainer: pl.Trainer, stop: StopSignals) -> TrainingData:
    """Return the data module; where there is to be a cache, all processes build what is missing of it."""
    if not isinstance(task, DiffusionTask) or not config.cache.folder:
        return TrainingData(config)
    task.model.to(trainer.strategy.root_device)
    section = ensure_cache(config, task.model, check=stop.check, quiet=not trainer.is_global_zero)
    return CachedDataModule(config, section)


def make_trainer(
    config: Config,
    folder: Path,
    stop: StopSignals,
    step: int = -1,
    callbacks: list[Callback] | None = None,
) -> pl.Trainer:
    """Build Lightning's trainer with this project's callbacks and loggers.

    Args:
        config: the experiment.
        folder: of the run.
        stop: says whether a signal came.
        step: optimizer step that the run goes on from, -1 for a start.
        callbacks: others than a run's, which writes nothing then.
    """
    options, writer = config.trainer, SafeCheckpointIO()
    sharded = options.strategy in STRATEGY_NAMES
    trainer = pl.Trainer(
        max_steps=options.max_steps,
        max_epochs=-1,
        accelerator=options.accelerator,
        devices=int(options.devices) if options.devices.isdigit() else options.devices,
        num_nodes=options.num_nodes,
        strategy=ShardedStrategy() if sharded else options.strategy,
        profiler=options.profiler or None,
        precision=options.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=config.optimizer.gradient_clip or None,
        val_check_interval=options.validate_every * options.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=make_loggers(config, folder, step),
        callbacks=_callbacks(config, folder, stop, writer) if callbacks is None else callbacks,
        enable_checkpointing=callbacks is None,
        plugins=[] if not sharded and options.strategy.startswith(OTHER_FILES) else [writer],
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
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


def _export(task: BaseTask, config: Config, folder: Path, *, writes: bool) -> None:
    """Write the averaged weights, once; an autoencoder whose latents are new gets its measured scale factor.

    Args:
        task: after training; all ranks have to come here where its weights are sharded.
        config: of the run.
        folder: for the model.
        writes: this process does.
    """
    if not writes and not task.sharded:
        return
    model = task.model
    assert isinstance(model, LatentDiffusion)
    with task.averaged_weights():
        if isinstance(task, AutoencoderTask) and not task.decoder_only:
            # a stream of its own, so that a run that was stopped on the way measures the same samples
            loader = ExemplarDataModule(config.data, config.seed).train_dataloader()
            batches = list(islice(loader, SCALE_BATCHES))
            config.model.autoencoder.scale_factor = measure_scale_factor(model.eval(), batches)
        if task.sharded:
            weights = on_the_cpu(model.state_dict())
            model = empty_model(config.model)
            model.load_state_dict(weights, assign=True)
        if writes:
            save_model(folder, model)
