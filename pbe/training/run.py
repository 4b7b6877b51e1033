"""Run a configuration: build the model, train it, export its weights."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import SIGTERMException

from pbe.checkpoints.adapters import ADAPTER_NAME, save_adapter
from pbe.checkpoints.key_map import empty_model
from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.native import check_keys, save_model
from pbe.config import Config, save_yaml
from pbe.data.datamodule import TrainingData
from pbe.errors import UserError
from pbe.files import new_folder
from pbe.models import LatentDiffusion
from pbe.models.adapters import adapter_state
from pbe.training.latent_cache.builder import CacheSize, describe_folder, ensure_cache, size_on_disk
from pbe.training.latent_cache.dataset import CachedDataModule
from pbe.training.monitoring.loggers import CsvLog, close_loggers, keep_run_id
from pbe.training.optimization.sharding import from_all_ranks, on_the_cpu
from pbe.training.resume.callback import Checkpoints
from pbe.training.resume.files import changed_settings, find_checkpoint, read_checkpoint, report, step_of
from pbe.training.resume.signals import StopSignals, TrainingStopped
from pbe.training.setup import (
    apply_performance_options,
    build_model,
    check_machine,
    find_autoencoder,
    make_task,
    make_trainer,
    prepare_process,
)
from pbe.training.tasks.autoencoder import AutoencoderTask, measure_scale_factor
from pbe.training.tasks.base import BaseTask
from pbe.training.tasks.diffusion import DiffusionTask
from pbe.training.tasks.finetuning import follow_model

LOG = logging.getLogger(__name__)
SCALE_BATCHES = 8  # that the scale factor of the latents is measured on


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a training run.

    Attributes:
        output_dir: of the run: ``config.yaml``, ``metrics.csv``, ``checkpoints/``, ``grids/``, ``model/``.
        model_dir: averaged weights in the native layout, of the last step or of a stop by a signal; of a run
            that trains adapters their file.
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


def train(config: Config, extra: Sequence[Callback] = ()) -> TrainResult:
    """Train as configured, from the newest checkpoint when ``trainer.resume`` says so.

    ``extra`` are callbacks beside the run's own.
    """
    started = time.monotonic()
    prepare_process(config)
    check_machine(config.trainer)  # before anything is read or made
    folder, stop = Path(config.output_dir), StopSignals()
    checkpoint = find_checkpoint(config)
    begun = step_of(checkpoint)
    with stop.listening(), new_folder(folder):
        model, config = build_model(config)
        trainer = make_trainer(config, folder, stop, begun)
        trainer.callbacks[:0] = extra  # type: ignore[attr-defined] # before the checkpoint, which ends a step
        apply_performance_options(model, config.trainer)
        task = make_task(config, model)
        if checkpoint is not None:
            check_checkpoint(checkpoint, task)
        finished = _run(trainer, task, checkpoint, stop)
    seconds, steps = time.monotonic() - started, max(trainer.global_step, begun, 0)
    stopped_by = 0 if finished else stop.received
    made = folder / (ADAPTER_NAME if task.adapted else "model")
    return TrainResult(folder, made, steps, seconds, stopped_by, trainer.global_rank)


def _run(trainer: pl.Trainer, task: BaseTask, checkpoint: Path | None, stop: StopSignals) -> bool:
    """Train, validate and export; returns whether the run came to its end."""
    config, data = task.config, None
    folder = Path(config.output_dir)
    try:
        data = _open_data(config, task, trainer, stop)
        trainer.fit_loop.epoch_loop.max_steps = data.steps_of_run(trainer.world_size)
        if trainer.is_global_zero:
            save_yaml(config, folder / "config.yaml")
            keep_run_id(folder, trainer.loggers)
        _fit(trainer, task, data, checkpoint, stop)
        if not _stopped(stop):
            _validate(trainer, task, data)
            export(task, folder / "model", writes=trainer.is_global_zero)
            return True
    except (TrainingStopped, SIGTERMException):  # Lightning's comes for a signal before the first batch
        pass
    finally:
        close_loggers(trainer.loggers)
        if data is not None:
            data.close()
    _export_early(trainer, task, folder / "model")
    return False


def _open_data(config: Config, task: BaseTask, trainer: pl.Trainer, stop: StopSignals) -> TrainingData:
    """Return the data module; where there is to be a cache, all processes build what is missing of it."""
    if not isinstance(task, DiffusionTask) or not config.cache.folder:
        data = TrainingData(config)
        data.open()
        return data
    task.model.to(trainer.strategy.root_device)
    store = ensure_cache(config, task.model, check=stop.check, quiet=not trainer.is_global_zero)
    return CachedDataModule(config, store)


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
    if _stopped(stop):
        raise TrainingStopped
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=False)


def _stopped(stop: StopSignals) -> bool:
    """Return whether a signal came to any rank, the same on all of them."""
    stop.received = max(from_all_ranks(stop.received))
    return bool(stop.received)


def _validate(
    trainer: pl.Trainer, task: BaseTask, data: TrainingData, checkpoint: Path | None = None
) -> None:
    """Validate unless these very weights have been (the run may have been stopped right after it)."""
    step = max(trainer.global_step, step_of(checkpoint))
    logs = [logger for logger in trainer.loggers if isinstance(logger, CsvLog)]
    if task.validated_step != step and not any(log.has(step, "val/loss") for log in logs):
        trainer.validate(task, datamodule=data, ckpt_path=checkpoint, verbose=False, weights_only=False)


def check_checkpoint(path: Path, task: BaseTask) -> None:
    """Check that a checkpoint continues this very task, and report which settings have changed."""
    content = read_checkpoint(path)
    check_keys(content["state_dict"], task, f"checkpoint '{path}'")
    base = task.base_fingerprint()
    if base and content["base"] != base:
        what, setting = ("adapters", "lora.base") if task.adapted else ("student", "trainer.precision")
        were = "were" if task.adapted else "was"
        raise UserError(
            f"the {what} of '{path}' {were} trained beside other weights than those of "
            f"'{task.config.init_from}', or in another {setting}; name those of its start, or another "
            "output_dir"
        )
    if task.ema is not None and not content["ema"]:
        raise UserError(
            f"'{path}' was trained without a moving average; set optimizer.ema_decay=0 or another output_dir"
        )
    changed = changed_settings(content["config"], task.config) if content["config"] else []
    if changed:
        step = content["global_step"]
        report(f"resuming from step {step} of '{path}' with changed settings: {'; '.join(changed)}")


def export(task: BaseTask, folder: Path, *, writes: bool) -> None:
    """Write the averaged weights, once; an autoencoder whose latents are new gets its measured scale factor.

    Of a run that trains adapters these are written, beside the folder.
    The files of an older model there are replaced when all new ones are whole. All ranks have to come here
    where the weights are sharded; one ``writes``.
    """
    if not writes and not task.sharded:
        return
    for left in folder.glob(".saving-*"):  # of a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    model = task.model
    assert isinstance(model, LatentDiffusion)
    if task.adapted:
        with task.averaged_weights():
            lora, base, unet = task.config.lora, task.config.init_from, model.config.unet
            said = {"few_steps": unet.few_steps, "guidance_range": unet.guidance_range}
            said = said if unet.few_steps else {}
            save_adapter(folder.parent / ADAPTER_NAME, adapter_state(model), lora.alpha, base, said)
        return
    with task.averaged_weights():
        if isinstance(task, AutoencoderTask) and not task.decoder_only:
            # a stream of its own, so that a run that was stopped on the way measures the same samples
            batches = list(islice(TrainingData(task.config).train_dataloader(), SCALE_BATCHES))
            factor = measure_scale_factor(model.eval(), batches)
            autoencoder = replace(model.config.autoencoder, scale_factor=factor)
            model.config = replace(model.config, autoencoder=autoencoder)
        if not task.sharded and model.dtype == torch.float32:
            save_model(folder, model)
            return
    model = _whole_copy(task, model)
    if writes:
        save_model(folder, model, torch.float32)


def _export_early(trainer: pl.Trainer, task: BaseTask, folder: Path) -> None:
    """Write the model of a run that a signal ended, after its checkpoint, if it has come to one.

    A model that finds no room, or no time before the process is killed, is written by the resumed run.
    """
    tried = [callback.tried for callback in trainer.callbacks if isinstance(callback, Checkpoints)]  # type: ignore[attr-defined]
    if tried != [trainer.global_step]:
        return
    try:
        export(task, folder, writes=trainer.is_global_zero)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        LOG.error(
            "could not write the model to '%s': %s; make room: the same command resumes", folder, reason
        )


def _whole_copy(task: BaseTask, model: LatentDiffusion) -> LatentDiffusion:
    """Return a copy of a model that is in shards or in half precision, with the averages in float32.

    All ranks have to call it where the weights are sharded.
    """
    weights = on_the_cpu(model.state_dict())
    if task.ema is not None:
        averages = on_the_cpu(task.ema.state_dict())
        weights |= {name.removeprefix("model."): value for name, value in averages.items()}
    copy = empty_model(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy


def build_cache(config: Config, share: tuple[int, int] = (0, 1)) -> int:
    """Build the latent cache of a configuration, or part ``i`` of ``n`` of it (from 0).

    Returns the signal that stopped it, or 0.
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
    prepare_process(config)
    if config.model_from_init:
        config = follow_model(config, open_checkpoint(config.start).config)
    trained = Path(config.autoencoder_from)
    if config.autoencoder_from and trained.is_dir() and not config.start:
        _, autoencoder = find_autoencoder(config)
        config = replace(config, model=replace(config.model, autoencoder=autoencoder))
    with torch.device("meta"):
        model = LatentDiffusion(config.model)
    return size_on_disk(config, model)


def cache_list(config: Config) -> list[str]:
    """Return a line for everything in the folder of a latent cache: what it is, and whether it fits."""
    prepare_process(config)
    model, config = build_model(config)
    return describe_folder(config, model)
