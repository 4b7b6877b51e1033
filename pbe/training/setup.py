"""The model as its training starts: which weights it takes, and whether they fit the configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.native import CONFIG_NAME, load_config as load_model_config, load_part
from pbe.checkpoints.tower_weights import load_tower_weights
from pbe.config import AutoencoderConfig, Config, ModelConfig, to_dict
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.training.resume.files import flat, say
from pbe.training.tasks.autoencoder import AutoencoderTask
from pbe.training.tasks.base import BaseTask
from pbe.training.tasks.diffusion import DiffusionTask

# Of the model section: what shapes no weight, where the configuration decides and init_from does not.
OWN = ("image_size", "prediction", "schedule")
OWN_OF_ENCODER = ("tokens", "token_grid", "mean", "std")


def build_model(config: Config) -> tuple[LatentDiffusion, Config]:
    """Build the model with the weights that its training starts from.

    ``init_from`` gives all weights, in any layout; else the tower is pretrained and, for diffusion, the
    autoencoder and its scale factor come from ``autoencoder_from``.

    Returns:
        The model, and the configuration with the autoencoder's section as it was trained.

    Raises:
        UserError: no such model, or one of another shape.
    """
    if config.start:
        return _warm(config)
    if config.task == "autoencoder":
        torch.manual_seed(config.seed)
        model = LatentDiffusion(config.model)
        weights = config.autoencoder_loss
        if weights.perceptual_weight and weights.perceptual_on == "tower":
            print(load_tower_weights(model.exemplar_encoder.tower, config.model.exemplar_encoder))
        return model, config
    if not config.autoencoder_from:
        raise UserError("autoencoder_from is empty: name the model folder that holds the trained autoencoder")
    source, trained = find_autoencoder(config)
    config = replace(config, model=replace(config.model, autoencoder=trained))
    torch.manual_seed(config.seed)
    model = LatentDiffusion(config.model)
    load_part(source, "autoencoder", model.autoencoder)
    if not config.init_from:
        print("init_from is empty: the UNet starts from random weights (init_from=none says that it shall)")
    print(load_tower_weights(model.exemplar_encoder.tower, config.model.exemplar_encoder))
    return model, config


def find_autoencoder(config: Config) -> tuple[Path, AutoencoderConfig]:
    """Return the folder that ``autoencoder_from`` leads to, a run's to its ``model/``, and the sizes there.

    Raises:
        UserError: it is no model.
    """
    source = Path(config.autoencoder_from)
    if not source.exists():
        raise UserError(
            f"autoencoder_from is '{source}', which does not exist; name the folder of a trained "
            "autoencoder, or toy, the one that ships"
        )
    if not (source / CONFIG_NAME).is_file() and (source / "model" / CONFIG_NAME).is_file():
        source = source / "model"
    return source, load_model_config(source).autoencoder


def _warm(config: Config) -> tuple[LatentDiffusion, Config]:
    """Build the model with all weights of ``init_from``."""
    if not Path(config.start).exists():
        raise UserError(
            f"init_from: '{config.start}' is not a model folder, nor a checkpoint: it does not exist; "
            "init_from=none trains from random weights"
        )
    # a folder says its sizes, a bare checkpoint is taken for this run's
    sizes = None if Path(config.start).is_dir() else config.model
    opened = open_checkpoint(config.start, sizes)
    merged = _merged(config, opened.config)
    model = replace(opened, config=merged).read(torch.float32).requires_grad_(True)
    if config.model.autoencoder.mask_aware_decoder and not merged.autoencoder.mask_aware_decoder:
        torch.manual_seed(config.seed)
        model.autoencoder.make_mask_aware()
        model.config = replace(model.config, autoencoder=model.autoencoder.config)
    return model, replace(config, model=model.config)


def _merged(config: Config, stored: ModelConfig) -> ModelConfig:
    """Return the stored sizes with what the configuration decides.

    Raises:
        UserError: the two differ in what shapes weights or what these mean; every such key is named.
    """
    wanted = config.model
    encoder = {name: getattr(wanted.exemplar_encoder, name) for name in OWN_OF_ENCODER}
    merged = replace(
        stored,
        exemplar_encoder=replace(stored.exemplar_encoder, **encoder),
        **{name: getattr(wanted, name) for name in OWN},
    )
    # stored scale factor and tower weights win, and a plain decoder may be made mask-aware
    aware = merged.autoencoder.mask_aware_decoder or wanted.autoencoder.mask_aware_decoder
    taken = replace(
        merged,
        autoencoder=replace(
            merged.autoencoder,
            scale_factor=wanted.autoencoder.scale_factor,
            mask_aware_decoder=aware,
        ),
        exemplar_encoder=replace(merged.exemplar_encoder, pretrained=wanted.exemplar_encoder.pretrained),
    )
    if different := _differences(wanted, taken):
        raise UserError(
            "the model section of the configuration differs from that of init_from "
            f"'{config.start}': {'; '.join(different)}; make them equal"
        )
    if changed := _differences(merged, stored):
        say(f"training goes on from '{config.start}' with {'; '.join(changed)}")
    return merged


def _differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    first, second = flat(to_dict(one), "model."), flat(to_dict(other), "model.")
    return [f"{key} {first[key]} instead of {second[key]}" for key in first if first[key] != second[key]]


def make_task(config: Config, model: LatentDiffusion) -> BaseTask:
    """Return the task that a configuration names, over a model."""
    return DiffusionTask(config, model) if config.task == "diffusion" else AutoencoderTask(config, model)
