"""Which numbers a configuration may hold: ranges by key, and sizes that must fit each other."""

from __future__ import annotations

import math

from omegaconf import DictConfig, ListConfig, OmegaConf

from pbe.errors import UserError

POSITIVE = (1, math.inf)
SHARE = (0, 1)
LARGEST = 2**53  # whole numbers up to here are numbers of their own in floating point too

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),  # NumPy's
    "model.image_size": POSITIVE,
    "model.schedule.timesteps": POSITIVE,
    "model.schedule.beta_start": SHARE,
    "model.schedule.beta_end": SHARE,
    "model.unet.model_channels": POSITIVE,
    "model.unet.num_heads": POSITIVE,
    "model.unet.context_dim": POSITIVE,
    "model.unet.time_embed_mult": POSITIVE,
    "model.unet.norm_groups": POSITIVE,
    "model.autoencoder.channels": POSITIVE,
    "model.autoencoder.norm_groups": POSITIVE,
    "model.autoencoder.scale_factor": (0, math.inf),
    "model.unet.num_res_blocks": POSITIVE,
    "model.autoencoder.num_res_blocks": POSITIVE,
    "model.autoencoder.latent_channels": POSITIVE,
    "model.autoencoder.patch": (1, 64),
    "model.exemplar_encoder.image_size": (0, math.inf),
    "model.exemplar_encoder.mapper_width": (0, math.inf),
    "model.exemplar_encoder.token_grid": (0, math.inf),
    "model.exemplar_encoder.layout_grid": (0, 64),
    "model.exemplar_encoder.layout_width": POSITIVE,
    "model.exemplar_encoder.mapper_layers": (0, math.inf),
    "model.exemplar_encoder.mapper_heads": POSITIVE,
    "model.exemplar_encoder.mapper_mlp_ratio": POSITIVE,
    "objective.min_snr_gamma": (0, math.inf),
    "objective.drop_probability": SHARE,
    "autoencoder_loss.l1_weight": (0, math.inf),
    "autoencoder_loss.l2_weight": (0, math.inf),
    "autoencoder_loss.gradient_weight": (0, math.inf),
    "autoencoder_loss.kl_weight": (0, math.inf),
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
    "data.sample.bezier_jitter": (0, math.inf),
    "data.sample.exemplar_padding": (0, math.inf),
    "data.sample.augment.flip": SHARE,
    "data.sample.augment.rotate": SHARE,
    "data.sample.augment.rotate_limit": (0, 360),
    "data.sample.augment.blur": SHARE,
    "data.sample.augment.affine": SHARE,
    "data.sample.augment.affine_jitter": (0, math.inf),
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
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.eps": (0, math.inf),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.cooldown_steps": (0, math.inf),
    "optimizer.ema_decay": (0, 0.999999),
    "optimizer.gradient_clip": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "trainer.max_steps": (0, math.inf),
    "trainer.max_epochs": (0, math.inf),
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
    _check_finite(config, source)
    _check_flat(config, source)
    for key, (low, high) in RANGES.items():
        value = OmegaConf.select(config, key)
        if not low <= value <= high:
            limit = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
            raise UserError(f"{source}: '{key}' is {value}; it must be {limit}")
    _check_length(config, source)
    _check_lists(config, source)
    if not config.output_dir.strip():
        raise UserError(f"{source}: 'output_dir' is empty; name the folder of the run")
    betas = list(config.optimizer.betas)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"{source}: 'optimizer.betas' is {betas}; it must be two numbers from 0 to below 1")
    for key, other in SAME:
        value, wanted = OmegaConf.select(config, key), OmegaConf.select(config, other)
        if 0 not in (value, wanted) and value != wanted:  # 0 follows the other
            raise UserError(f"{source}: '{key}' is {value}, but '{other}' is {wanted}; they must be equal")
    if config.optimizer.fused and config.optimizer.name == "muon":
        raise UserError(f"{source}: 'optimizer.fused' is for adamw; set optimizer.fused=false with muon")
    if config.optimizer.fused and config.trainer.precision == "16-mixed" and config.optimizer.gradient_clip:
        raise UserError(
            f"{source}: 'optimizer.fused' with 'trainer.precision' 16-mixed cannot clip gradients; "
            "set optimizer.gradient_clip=0 or optimizer.fused=false"
        )
    _check_multiple(config, source)
    if config.task == "autoencoder":
        _check_autoencoder(config, source)


def _check_finite(config: DictConfig, source: str, prefix: str = "") -> None:
    """Refuse infinities, what is no number, and whole numbers that no counter holds."""
    for key in config:
        value, name = config[key], f"{prefix}{key!s}"
        if isinstance(value, DictConfig):
            _check_finite(value, source, f"{name}.")
            continue
        for number in value if isinstance(value, ListConfig) else [value]:
            if isinstance(number, int | float) and not abs(number) <= LARGEST:
                raise UserError(f"{source}: '{name}' is {number}; it must be a number of a sensible size")


def _check_length(config: DictConfig, source: str) -> None:
    steps, epochs = config.trainer.max_steps, config.trainer.max_epochs
    if not steps and not epochs:
        raise UserError(
            f"{source}: 'trainer.max_steps' and 'trainer.max_epochs' are 0; one of them must be at least 1"
        )
    if steps and epochs:
        raise UserError(
            f"{source}: 'trainer.max_steps' is {steps} and 'trainer.max_epochs' is {epochs}; "
            "one of them must be 0"
        )


def _check_flat(section: DictConfig, source: str, prefix: str = "") -> None:
    """Refuse lists and sections inside of lists, which OmegaConf lets pass where numbers and texts belong."""
    for key in section:
        node = section._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            _check_flat(node, source, f"{prefix}{key!s}.")
        elif isinstance(node, ListConfig) and any(isinstance(item, ListConfig | DictConfig) for item in node):
            raise UserError(f"{source}: '{prefix}{key!s}' is {list(node)}; it must be a plain list of values")


def _check_lists(config: DictConfig, source: str) -> None:
    """Check lists of sizes, and those with one number a channel."""
    for key in ("model.unet.channel_mult", "model.unet.attention_factors", "model.autoencoder.channel_mult"):
        numbers = list(OmegaConf.select(config, key))
        if min(numbers, default=0 if key.endswith("mult") else 1) < 1:
            raise UserError(f"{source}: '{key}' is {numbers}; it must be a list of numbers from 1 on")
    for key, low in (("mean", -math.inf), ("std", 0.0)):
        numbers = list(config.model.exemplar_encoder[key])
        if numbers and (len(numbers) != 3 or min(numbers) <= low):  # none are the tower's own
            raise UserError(
                f"{source}: 'model.exemplar_encoder.{key}' is {numbers}; it must be three numbers"
                + (" above 0" if low == 0.0 else "")
                + ", or [] for the tower's own"
            )


def _check_autoencoder(config: DictConfig, source: str) -> None:
    weights, size = config.autoencoder_loss, config.model.image_size
    if weights.train == "decoder" and config.init_from in ("", "none"):
        raise UserError(
            f"{source}: 'autoencoder_loss.train' is 'decoder', but 'init_from' is empty or none; "
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
    autoencoder = config.model.autoencoder
    levels = len(autoencoder.channel_mult) + len(config.model.unet.channel_mult) - 2
    multiple = autoencoder.patch * 2**levels
    if config.model.image_size % multiple:
        folding = (
            f"the autoencoder folds patches of {autoencoder.patch}, and " if autoencoder.patch > 1 else ""
        )
        raise UserError(
            f"{source}: 'model.image_size' is {config.model.image_size}; {folding}"
            f"autoencoder and UNet halve it {levels} times, so it must be a multiple of {multiple}"
        )
