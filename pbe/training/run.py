"""Run a configuration: build the model, train it, export its weights."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import SIGTERMException

from pbe.checkpoints.native import check_keys
from pbe.config import Config, save_yaml
from pbe.errors import UserError
from pbe.files import new_folder
from pbe.models import LatentDiffusion
from pbe.models.image_tower import follow_sizes
from pbe.training.data import TrainingData, steps_of_run
from pbe.training.export import export
from pbe.training.latent_cache.builder import ensure_cache
from pbe.training.latent_cache.dataset import CachedDataModule
from pbe.training.latent_cache.listing import describe_folder
from pbe.training.latent_cache.size import CacheSize, size_on_disk
from pbe.training.monitoring.loggers import CsvLog, close_loggers, keep_run_id
from pbe.training.optimization.performance import make_fast
from pbe.training.resume.callback import Checkpoints
from pbe.training.resume.files import changed_settings, find_checkpoint, read_checkpoint, say, step_of
from pbe.training.resume.signals import StopSignals, TrainingStopped
from pbe.training.setup import build_model, find_autoencoder, make_task
from pbe.training.tasks.base import BaseTask
from pbe.training.tasks.diffusion import DiffusionTask
from pbe.training.trainer import check_machine, make_trainer, set_length

LOG = logging.getLogger(__name__)
# What Lightning says of things that are meant to be so: few workers for small images, a frozen tower, no
# validation, a place in the data that the data module restores, and a library's own housekeeping.
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


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind.

    Attributes:
        output_dir: of the run: ``config.yaml``, ``metrics.csv``, ``checkpoints/``, ``grids/``, ``model/``.
        model_dir: averaged weights in the native layout, of the last step or of a stop by a signal.
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

    Args:
        config: the experiment; see ``configs/``.
        extra: callbacks beside the run's own.

    Raises:
        UserError: bad paths, a cache of other settings, unusable data, or a run that would be overwritten.
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
        set_length(trainer, steps_of_run(config, data, trainer.world_size))
        if trainer.is_global_zero:
            save_yaml(config, folder / "config.yaml")
            keep_run_id(folder, trainer.loggers)
        _fit(trainer, task, data, checkpoint, stop)
        if not stop.received:
            _validate(trainer, task, data)
            export(task, config, folder / "model", writes=trainer.is_global_zero)
            return True
    except (TrainingStopped, SIGTERMException):  # Lightning's comes for a signal before the first batch
        pass
    finally:
        close_loggers(trainer.loggers)
        if data is not None:
            data.close()
    _export_early(trainer, task, folder / "model")
    return False


def _export_early(trainer: pl.Trainer, task: BaseTask, folder: Path) -> None:
    """Write the model of a run that a signal ended, after its checkpoint, if it has come to one.

    A model that finds no room, or no time before the process is killed, is made by the run that goes on.
    """
    tried = [callback.tried for callback in trainer.callbacks if isinstance(callback, Checkpoints)]  # type: ignore[attr-defined]
    if tried != [trainer.global_step]:
        return
    try:
        export(task, task.config, folder, writes=trainer.is_global_zero)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        LOG.error(
            "could not write the model to '%s': %s; make room: the same command goes on", folder, reason
        )


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
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pbe").setLevel(logging.INFO)
    for message in NEEDLESS_ADVICE:
        warnings.filterwarnings("ignore", message=f".*{message}")


def _data(config: Config, task: BaseTask, trainer: pl.Trainer, stop: StopSignals) -> TrainingData:
    """Return the data module; where there is to be a cache, all processes build what is missing of it."""
    if not isinstance(task, DiffusionTask) or not config.cache.folder:
        data = TrainingData(config)
        data.open()
        return data
    task.model.to(trainer.strategy.root_device)
    section = ensure_cache(config, task.model, check=stop.check, quiet=not trainer.is_global_zero)
    return CachedDataModule(config, section)
