"""What a run is for: the averaged weights in the native layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from pbe.checkpoints.key_map import empty_model
from pbe.checkpoints.native import save_model
from pbe.config import Config
from pbe.data.datamodule import ExemplarDataModule
from pbe.models import LatentDiffusion
from pbe.training.optimization.sharding import on_the_cpu
from pbe.training.tasks.autoencoder import AutoencoderTask, measure_scale_factor
from pbe.training.tasks.base import BaseTask

SCALE_BATCHES = 8


def export(task: BaseTask, config: Config, folder: Path, *, writes: bool) -> None:
    """Write the averaged weights, once; an autoencoder whose latents are new gets its measured scale factor.

    The files of an older model there are replaced when all new ones are whole.

    Args:
        task: after training; all ranks have to come here where its weights are sharded.
        config: of the run.
        folder: for the model.
        writes: this process does.

    Raises:
        UserError: the folder cannot be made or written to; OSError: there is no room.
    """
    if not writes and not task.sharded:
        return
    for left in folder.glob(".saving-*"):  # of a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    model = task.model
    assert isinstance(model, LatentDiffusion)
    with task.averaged_weights():
        if isinstance(task, AutoencoderTask) and not task.decoder_only:
            _measure(model, config)
        if not task.sharded and model.dtype == torch.float32:
            save_model(folder, model)
            return
    model = _whole(task, model)
    if writes:
        save_model(folder, model, torch.float32)


def _measure(model: LatentDiffusion, config: Config) -> None:
    """Give the model the scale factor of its latents."""
    # a stream of its own, so that a run that was stopped on the way measures the same samples
    loader = ExemplarDataModule(config.data, config.seed).train_dataloader()
    factor = measure_scale_factor(model.eval(), list(islice(loader, SCALE_BATCHES)))
    autoencoder = replace(model.config.autoencoder, scale_factor=factor)
    model.config = replace(model.config, autoencoder=autoencoder)


def _whole(task: BaseTask, model: LatentDiffusion) -> LatentDiffusion:
    """Return a copy of a model that is in shards or in half precision, with the averages as they are kept.

    All ranks have to ask where the weights are sharded.
    """
    weights = on_the_cpu(model.state_dict())
    if task.ema is not None:
        averages = on_the_cpu(task.ema.state_dict())
        weights |= {name.removeprefix("model."): value for name, value in averages.items()}
    copy = empty_model(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy
