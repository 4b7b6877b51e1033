"""Run a configuration: build the model, train it, export its weights."""

from __future__ import annotations

import logging
import pickle
import time
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.utilities.exceptions import SIGTERMException

from pbe.checkpoints.native import check_keys, load_model, load_part, save_model
from pbe.checkpoints.native import load_config as load_model_config
from pbe.config import Config, ModelConfig, save_yaml
from pbe.data.datamodule import ExemplarDataModule
from pbe.errors import UserError
from pbe.files import make_folder
from pbe.models import LatentDiffusion
from pbe.models.tower import load_pretrained
from pbe.training.autoencoder_task import AutoencoderTask, measure_scale_factor
from pbe.training.base_task import BaseTask
from pbe.training.callbacks import Checkpoints, GridCallback, StepLog, StopSignals, TrainingStopped
from pbe.training.diffusion_task import DiffusionTask
from pbe.training.grids import autoencoder_grid, diffusion_grid
from pbe.training.latent_cache import CachedDataModule, ensure_cache
from pbe.training.loggers import CsvLog, close_loggers, make_loggers

SCALE_BATCHES = 8
# What Lightning says of things that are meant to be so: few workers for small pictures, a frozen tower,
# a place in the data that the data module restores, and a library's own housekeeping.
NEEDLESS_ADVICE = (
    "does not have many workers",
    r"module\(s\) in eval mode",
    "You have overridden `transfer_batch_to_device`",
    "your dataloader is not resumable",
    "is smaller than the logging interval",
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
    """

    output_dir: Path
    model_dir: Path
    steps: int
    seconds: float
    stopped_by: int


def train(config: Config) -> TrainResult:
    """Train as configured, from the newest checkpoint when ``trainer.resume`` says so.

    Args:
        config: the experiment; see ``configs/``.

    Raises:
        UserError: bad paths, a cache of other settings, unusable data, or a run that would be overwritten.
    """
    started = time.monotonic()
    _prepare_process(config)
    folder = Path(config.output_dir)
    checkpoint = find_checkpoint(config)
    make_folder(folder)
    model, config = build_model(config)
    stop = StopSignals()
    trainer = make_trainer(config, folder, stop)
    data = _data(config, model)
    task = DiffusionTask(config, model) if config.task == "diffusion" else AutoencoderTask(config, model)
    if checkpoint is not None:
        check_checkpoint(checkpoint, task)
    save_yaml(config, folder / "config.yaml")
    try:
        with stop.listening():
            _fit(trainer, task, data, checkpoint, stop)
            finished = not stop.received
            if finished:
                _validate(trainer, task, data)
                _export(task, config, folder / "model")
    finally:
        close_loggers(trainer.loggers)
    seconds = time.monotonic() - started
    return TrainResult(
        folder, folder / "model", trainer.global_step, seconds, 0 if finished else stop.received
    )


def _fit(
    trainer: pl.Trainer,
    task: BaseTask,
    data: pl.LightningDataModule,
    checkpoint: Path | None,
    stop: StopSignals,
) -> None:
    """Train to the end or to a signal, with a validation before the first step."""
    step = _step_of(checkpoint)
    for logger in trainer.loggers:
        if isinstance(logger, CsvLog):
            logger.cut(step)
    if step <= 0 or step % task.config.trainer.validate_every == 0:
        _validate(trainer, task, data, checkpoint)
    if stop.received:
        return
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    except (TrainingStopped, SIGTERMException):  # Lightning's comes for a signal before the first batch
        return


def _step_of(checkpoint: Path | None) -> int:
    """Return the optimizer step of a checkpoint, -1 for none."""
    return -1 if checkpoint is None else int(_read_checkpoint(checkpoint)["global_step"])


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        return {key: content[key] for key in ("global_step", "state_dict")} | {"ema": content.get("ema")}
    except (RuntimeError, EOFError, KeyError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"'{path}' is damaged or no checkpoint of this project; delete it or name another"
        ) from error


def check_checkpoint(path: Path, task: BaseTask) -> None:
    """Check that a checkpoint continues this very task.

    Raises:
        UserError: it is damaged, of a model of other sizes, or lacks the moving average that is asked for.
    """
    content = _read_checkpoint(path)
    check_keys(content["state_dict"], task, f"checkpoint '{path}'")
    if task.ema is not None and not content["ema"]:
        raise UserError(
            f"'{path}' was trained without a moving average; set optimizer.ema_decay=0 or another output_dir"
        )


def _validate(
    trainer: pl.Trainer, task: BaseTask, data: pl.LightningDataModule, checkpoint: Path | None = None
) -> None:
    """Validate unless these very weights have been (the run may have been stopped right after it)."""
    step = max(trainer.global_step, _step_of(checkpoint))
    logs = [logger for logger in trainer.loggers if isinstance(logger, CsvLog)]
    if task.validated_step != step and not any(log.has(step, "val/loss") for log in logs):
        trainer.validate(task, datamodule=data, ckpt_path=checkpoint, verbose=False, weights_only=False)


def _prepare_process(config: Config) -> None:
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    pl.seed_everything(config.seed, verbose=False)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pbe").setLevel(logging.INFO)
    for message in NEEDLESS_ADVICE:
        warnings.filterwarnings("ignore", message=f".*{message}")


def find_checkpoint(config: Config) -> Path | None:
    """Return the checkpoint to continue from, or None for a start.

    Raises:
        UserError: ``resume=never`` on an existing run, or a named checkpoint that does not exist.
    """
    last = Path(config.output_dir) / "checkpoints" / "last.ckpt"
    if config.trainer.resume == "auto":
        return last if last.is_file() else None
    if config.trainer.resume == "never":
        if last.is_file():
            raise UserError(
                f"'{config.output_dir}' holds a run already; name another output_dir or resume it"
            )
        return None
    named = Path(config.trainer.resume)
    if not named.is_file():
        raise UserError(f"trainer.resume: no checkpoint at '{named}'")
    return named


def build_model(config: Config) -> tuple[LatentDiffusion, Config]:
    """Build the model with the weights that its training starts from.

    ``init_from`` gives all weights; else the tower is pretrained and, for diffusion, the autoencoder
    and its scale factor come from ``autoencoder_from``.

    Returns:
        The model, and the configuration with the autoencoder's section as it was trained.
    """
    if config.init_from:
        model = load_model(config.init_from).requires_grad_(True)
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
    print(load_pretrained(model.exemplar_encoder.tower, config.model.exemplar_encoder))
    return model, config


def _check_same_model(config: Config, stored: ModelConfig) -> None:
    """Refuse ``init_from`` a model of another shape; the stored scale factor and tower weights win."""
    autoencoder = replace(config.model.autoencoder, scale_factor=stored.autoencoder.scale_factor)
    encoder = replace(config.model.exemplar_encoder, pretrained=stored.exemplar_encoder.pretrained)
    if replace(config.model, autoencoder=autoencoder, exemplar_encoder=encoder) != stored:
        raise UserError(
            f"the model section of the configuration differs from that of init_from '{config.init_from}'; "
            "make them equal"
        )


def _data(config: Config, model: LatentDiffusion) -> pl.LightningDataModule:
    if config.task == "autoencoder" or not config.cache.folder:
        return ExemplarDataModule(config.data, config.seed)
    ensure_cache(config, model)
    return CachedDataModule(config)


def make_trainer(config: Config, folder: Path, stop: StopSignals) -> pl.Trainer:
    """Build Lightning's trainer with this project's callbacks and loggers."""
    options = config.trainer
    return pl.Trainer(
        max_steps=options.max_steps,
        max_epochs=-1,
        accelerator=options.accelerator,
        devices=int(options.devices) if options.devices.isdigit() else options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
        precision=options.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=config.optimizer.gradient_clip or None,
        val_check_interval=options.validate_every * options.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=options.validation_batches,
        num_sanity_val_steps=0,
        logger=make_loggers(config, folder),
        callbacks=_callbacks(config, folder, stop),
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def _callbacks(config: Config, folder: Path, stop: StopSignals) -> list[Callback]:
    options = config.trainer
    made: list[Callback] = [
        StepLog(config.logging.every),
        Checkpoints(folder / "checkpoints", options.checkpoint_every, options.keep_checkpoints, stop),
    ]
    if options.progress:
        made.append(TQDMProgressBar(refresh_rate=10))
    if config.logging.grid_every:
        source = diffusion_grid(config) if config.task == "diffusion" else autoencoder_grid(config)
        made.append(GridCallback(source, folder, config.logging.grid_every))
    return made


def _export(task: BaseTask, config: Config, folder: Path) -> None:
    """Write the averaged weights; an autoencoder gets its measured scale factor."""
    model = task.model
    assert isinstance(model, LatentDiffusion)
    with task.averaged_weights():
        if isinstance(task, AutoencoderTask):
            # a stream of its own, so that a run that was stopped on the way measures the same samples
            loader = ExemplarDataModule(config.data, config.seed).train_dataloader()
            batches = list(islice(loader, SCALE_BATCHES))
            config.model.autoencoder.scale_factor = measure_scale_factor(model.eval(), batches)
        save_model(folder, model)
