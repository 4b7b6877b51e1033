"""Which numbers a configuration may hold: ranges by key, and sizes that must fit each other."""

from __future__ import annotations

import math

from omegaconf import DictConfig, OmegaConf

from pbe.errors import UserError

POSITIVE = (1, math.inf)
SHARE = (0, 1)

RANGES: dict[str, tuple[float, float]] = {
    "model.image_size": POSITIVE,
    "model.unet.num_res_blocks": POSITIVE,
    "model.autoencoder.num_res_blocks": POSITIVE,
    "model.autoencoder.latent_channels": POSITIVE,
    "model.exemplar_encoder.image_size": (0, math.inf),
    "model.exemplar_encoder.mapper_width": (0, math.inf),
    "model.exemplar_encoder.token_grid": (0, math.inf),
    "objective.drop_probability": SHARE,
    "autoencoder_loss.masked_share": SHARE,
    "autoencoder_loss.hole_weight": (0.001, math.inf),
    "autoencoder_loss.perceptual_weight": (0, math.inf),
    "autoencoder_loss.adversarial_weight": (0, math.inf),
    "autoencoder_loss.adversarial_start": (0, math.inf),
    "autoencoder_loss.discriminator_layers": (1, 8),
    "autoencoder_loss.discriminator_channels": POSITIVE,
    "data.batch_size": POSITIVE,
    "data.num_workers": (0, math.inf),
    "data.min_box_area": SHARE,
    "data.max_box_area": SHARE,
    "data.max_bad_share": SHARE,
    "data.sample.arbitrary_mask_share": SHARE,
    "data.sample.extend_fraction": SHARE,
    "data.sample.shrink_fraction": SHARE,
    "data.sample.min_keep_share": (0, 0.5),
    "data.sample.min_box_cover": SHARE,
    "data.sample.object_mask_share": SHARE,
    "data.sample.object_mask_dilate": (0, 512),
    "data.sample.antialias_above": POSITIVE,
    "cache.variants": POSITIVE,
    "cache.batch_size": POSITIVE,
    "cache.shard_samples": (0, math.inf),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.ema_decay": (0, 0.999999),
    "optimizer.gradient_clip": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "trainer.max_steps": POSITIVE,
    "trainer.num_nodes": POSITIVE,
    "trainer.accumulate": POSITIVE,
    "trainer.threads": (0, math.inf),
    "trainer.checkpoint_every": POSITIVE,
    "trainer.max_skipped": (0, math.inf),
    "trainer.checkpoint_minutes": (0, math.inf),
    "trainer.keep_every": (0, math.inf),
    "trainer.keep_checkpoints": (-1, math.inf),
    "trainer.validate_every": POSITIVE,
    "trainer.validation_samples": POSITIVE,
    "trainer.overfit_batches": (0, math.inf),
    "logging.every": POSITIVE,
    "logging.grid_every": (0, math.inf),
    "logging.grid_samples": POSITIVE,
    "logging.grid_steps": (1, 500),
}

SAME = (
    ("data.image_size", "model.image_size"),
    ("data.exemplar_size", "model.exemplar_encoder.image_size"),
)


def check_numbers(config: DictConfig, source: str) -> None:
    """Check the ranges of a whole configuration, and the sizes that depend on each other.

    Args:
        config: all sections, resolved.
        source: named in errors.

    Raises:
        UserError: the first number that is out of its range or does not fit another.
    """
    for key, (low, high) in RANGES.items():
        value = OmegaConf.select(config, key)
        if not low <= value <= high:
            limit = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
            raise UserError(f"{source}: '{key}' is {value}; it must be {limit}")
    betas = list(config.optimizer.betas)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"{source}: 'optimizer.betas' is {betas}; it must be two numbers from 0 to below 1")
    for key, other in SAME:
        value, wanted = OmegaConf.select(config, key), OmegaConf.select(config, other)
        if 0 not in (value, wanted) and value != wanted:  # 0 follows the other
            raise UserError(f"{source}: '{key}' is {value}, but '{other}' is {wanted}; they must be equal")
    if config.optimizer.fused and config.trainer.precision == "16-mixed" and config.optimizer.gradient_clip:
        raise UserError(
            f"{source}: 'optimizer.fused' with 'trainer.precision' 16-mixed cannot clip gradients; "
            "set optimizer.gradient_clip=0 or optimizer.fused=false"
        )
    _check_multiple(config, source)
    if config.task == "autoencoder":
        _check_autoencoder(config, source)


def _check_autoencoder(config: DictConfig, source: str) -> None:
    weights, size = config.autoencoder_loss, config.model.image_size
    if weights.train == "decoder" and not config.init_from:
        raise UserError(
            f"{source}: 'autoencoder_loss.train' is 'decoder', but 'init_from' is empty; "
            "name the model whose decoder is to be trained"
        )
    if weights.discriminator_channels % 16:
        raise UserError(
            f"{source}: 'autoencoder_loss.discriminator_channels' is {weights.discriminator_channels}; "
            "it must be a multiple of 16"
        )
    # strided layers halve, the two last ones take a pixel each and need one to be left
    smallest = 3 * 2**weights.discriminator_layers
    if weights.adversarial_weight and size < smallest:
        raise UserError(
            f"{source}: 'model.image_size' is {size}; a discriminator of {weights.discriminator_layers} "
            f"layers needs {smallest} at least; lower autoencoder_loss.discriminator_layers"
        )


def _check_multiple(config: DictConfig, source: str) -> None:
    levels = len(config.model.autoencoder.channel_mult) + len(config.model.unet.channel_mult) - 2
    multiple = 2**levels
    if config.model.image_size % multiple:
        raise UserError(
            f"{source}: 'model.image_size' is {config.model.image_size}; "
            f"autoencoder and UNet halve it {levels} times, so it must be a multiple of {multiple}"
        )
