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
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar

from pbe.checkpoints.native import load_config as load_model_config
from pbe.checkpoints.native import load_model, load_part, save_model
from pbe.config import Config, save_yaml
from pbe.data.datamodule import ExemplarDataModule
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.tower import load_pretrained
from pbe.training.autoencoder_task import AutoencoderTask, measure_scale_factor
from pbe.training.base_task import BaseTask
from pbe.training.callbacks import GridCallback, StopOnSignal
from pbe.training.diffusion_task import DiffusionTask
from pbe.training.grids import autoencoder_grid, diffusion_grid
from pbe.training.latent_cache import CachedDataModule, ensure_cache
from pbe.training.loggers import CsvLog, make_loggers

SCALE_BATCHES = 8


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
    folder.mkdir(parents=True, exist_ok=True)
    model, config = build_model(config)
    data = _data(config, model)
    task = DiffusionTask(config, model) if config.task == "diffusion" else AutoencoderTask(config, model)
    stop = StopOnSignal(folder / "checkpoints" / "last.ckpt")
    trainer = make_trainer(config, folder, stop)
    save_yaml(config, folder / "config.yaml")
    if checkpoint is None:
        trainer.validate(task, datamodule=data, verbose=False)
    else:
        _cut_logs(trainer, checkpoint)
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    if not stop.received:
        trainer.validate(task, datamodule=data, verbose=False)
        _export(task, config, data, folder / "model")
    return TrainResult(
        folder, folder / "model", trainer.global_step, time.monotonic() - started, stop.received
    )


def _prepare_process(config: Config) -> None:
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    pl.seed_everything(config.seed, verbose=False)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    # Lightning's advice on worker counts: small runs feed themselves best from the main process
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


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


def _data(config: Config, model: LatentDiffusion) -> pl.LightningDataModule:
    if config.task == "autoencoder" or not config.cache.folder:
        return ExemplarDataModule(config.data, config.seed)
    ensure_cache(config, model)
    return CachedDataModule(config)


def make_trainer(config: Config, folder: Path, stop: StopOnSignal) -> pl.Trainer:
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
        log_every_n_steps=config.logging.every,
        logger=make_loggers(config, folder),
        callbacks=_callbacks(config, folder, stop),
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def _callbacks(config: Config, folder: Path, stop: StopOnSignal) -> list[Callback]:
    options = config.trainer
    made: list[Callback] = [
        ModelCheckpoint(
            folder / "checkpoints",
            filename="{step:07d}",
            every_n_train_steps=options.checkpoint_every,
            save_top_k=options.keep_checkpoints,
            monitor="step",
            mode="max",
            save_last=True,
            save_on_train_epoch_end=False,
        ),
        stop,
    ]
    if options.progress:
        made.append(TQDMProgressBar(refresh_rate=10))
    if config.logging.grid_every:
        source = diffusion_grid(config) if config.task == "diffusion" else autoencoder_grid(config)
        made.append(GridCallback(source, folder, config.logging.grid_every))
    return made


def _cut_logs(trainer: pl.Trainer, checkpoint: Path) -> None:
    step = int(torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)["global_step"])
    for logger in trainer.loggers:
        if isinstance(logger, CsvLog):
            logger.cut(step)


def _export(task: BaseTask, config: Config, data: pl.LightningDataModule, folder: Path) -> None:
    """Write the averaged weights; an autoencoder gets its measured scale factor."""
    model = task.model
    assert isinstance(model, LatentDiffusion)
    with task.averaged_weights():
        if isinstance(task, AutoencoderTask):
            batches = list(islice(data.train_dataloader(), SCALE_BATCHES))
            config.model.autoencoder.scale_factor = measure_scale_factor(model.eval(), batches)
        save_model(folder, model)
