"""Validation of a configuration: choices, ranges, and values that must fit each other."""

from __future__ import annotations

import math
from typing import Any

from pbe.config.fields import described, flatten, to_dict
from pbe.config.training import NONE, PARTS, Config
from pbe.errors import UserError

FIELDS = dict(described(Config))
CHOICES: dict[str, tuple[str, ...]] = {
    key: field.metadata["choices"] for key, field in FIELDS.items() if "choices" in field.metadata
}
RANGES: dict[str, tuple[float, float]] = {
    key: field.metadata["range"] for key, field in FIELDS.items() if "range" in field.metadata
}
PATHS = tuple(key for key, field in FIELDS.items() if "path" in field.metadata)
DEFAULT_GUIDANCE = 5
LARGEST = 2**53  # whole numbers up to here are exact in floating point too
SAME = (
    ("data.image_size", "model.image_size"),
    ("data.exemplar_size", "model.exemplar_encoder.image_size"),
)


def check_choices(config: Any) -> None:
    """Check every field of a configuration dataclass that holds one of several names."""
    values = flatten(to_dict(config))
    for key, field in described(type(config)):
        allowed = field.metadata.get("choices")
        if allowed and values[key] not in allowed:
            given = " ".join(str(values[key]).split())
            raise UserError(f"'{key}' is '{given}'; it must be one of {', '.join(allowed)}")


def check_values(config: Config) -> None:
    """Check the ranges of a whole configuration, and the values that depend on each other."""
    values = flatten(to_dict(config))
    for key, value in values.items():
        _check_value(key, value)
    for key, (low, high) in RANGES.items():
        if not low <= values[key] <= high:
            limit = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
            raise UserError(f"'{key}' is {values[key]}; it must be {limit}")
    if not config.output_dir.strip():
        raise UserError("'output_dir' is empty; name the folder of the run")
    for key, other in SAME:
        value, wanted = values[key], values[other]
        if config.model_from_init:  # which is not read yet
            continue
        if 0 not in (value, wanted) and value != wanted:  # 0 follows the other
            raise UserError(f"'{key}' is {value}, but '{other}' is {wanted}; they must be equal")
    _check_lists(values)
    _check_length(config)
    _check_optimizer(config)
    _check_multiple(config)
    _check_finetuning(config)
    if config.task == "autoencoder":
        _check_autoencoder(config)
    if config.task == "distillation":
        _check_distillation(config)


def _check_value(key: str, value: Any) -> None:
    """Refuse nested lists, which OmegaConf lets pass, NaN, infinities, and numbers beyond any counter."""
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        raise UserError(f"'{key}' is {value}; it must be a plain list of values")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not abs(number) <= LARGEST:
            raise UserError(f"'{key}' is {number}; it must be a number of a sensible size")


def _check_lists(values: dict[str, Any]) -> None:
    """Check lists of sizes, and those with one number per channel."""
    for key in ("model.unet.channel_mult", "model.unet.attention_factors", "model.autoencoder.channel_mult"):
        if min(values[key], default=0 if key.endswith("mult") else 1) < 1:
            raise UserError(f"'{key}' is {values[key]}; it must be a list of numbers of at least 1")
    scales = values["model.unet.guidance_range"]
    if scales and (len(scales) != 2 or not 0 <= scales[0] <= scales[1]):
        raise UserError(f"'model.unet.guidance_range' is {scales}; it must be two numbers from 0 up, or []")
    for key, low in (("mean", -math.inf), ("std", 0.0)):
        numbers = values[f"model.exemplar_encoder.{key}"]
        if numbers and (len(numbers) != 3 or min(numbers) <= low):
            above = " above 0" if low == 0.0 else ""
            raise UserError(
                f"'model.exemplar_encoder.{key}' is {numbers}; it must be three numbers{above}, "
                "or [] for the tower's own"
            )


def _check_length(config: Config) -> None:
    steps, epochs = config.trainer.max_steps, config.trainer.max_epochs
    if not steps and not epochs:
        raise UserError("'trainer.max_steps' and 'trainer.max_epochs' are 0; one of them must be at least 1")
    if steps and epochs:
        raise UserError(
            f"'trainer.max_steps' is {steps} and 'trainer.max_epochs' is {epochs}; one of them must be 0"
        )


def _check_optimizer(config: Config) -> None:
    options = config.optimizer
    if len(options.betas) != 2 or not all(0 <= beta < 1 for beta in options.betas):
        raise UserError(f"'optimizer.betas' is {options.betas}; it must be two numbers from 0 to below 1")
    if options.fused and options.name == "muon":
        raise UserError("'optimizer.fused' is for adamw; set optimizer.fused=false with muon")
    if options.fused and config.trainer.precision == "16-mixed" and options.gradient_clip:
        raise UserError(
            "'optimizer.fused' with 'trainer.precision' 16-mixed cannot clip gradients; "
            "set optimizer.gradient_clip=0 or optimizer.fused=false"
        )


def _check_multiple(config: Config) -> None:
    size, autoencoder = config.model.image_size, config.model.autoencoder
    levels = len(autoencoder.channel_mult) + len(config.model.unet.channel_mult) - 2
    multiple = autoencoder.patch * 2**levels
    if size % multiple:
        folding = (
            f"the autoencoder folds patches of {autoencoder.patch}, and " if autoencoder.patch > 1 else ""
        )
        raise UserError(
            f"'model.image_size' is {size}; {folding}autoencoder and UNet halve it {levels} times, "
            f"so it must be a multiple of {multiple}"
        )


def _check_finetuning(config: Config) -> None:
    """Check what starts from a model: its sizes, named parts, adapters, and what is mixed in."""
    lora, parts = config.lora, config.optimizer.parts
    for key, names in (("optimizer.parts", parts), ("lora.targets", lora.targets)):
        if unknown := [name for name in names if name not in PARTS]:
            raise UserError(f"'{key}' names '{unknown[0]}'; there are: {', '.join(PARTS)}")
    if config.model_from_init and not config.start:
        raise UserError("'model_from_init' takes the sizes of a model; name it in 'init_from'")
    if config.data.prior_shards and config.cache.folder:
        raise UserError("'data.prior_shards' cannot be used with a latent cache; set cache.folder= (empty)")
    if not lora.rank and not parts:
        return
    what = "lora.rank" if lora.rank else "optimizer.parts"
    if config.task != "diffusion" and not (lora.rank and config.task == "distillation"):
        raise UserError(f"'{what}' is for task=diffusion, not task={config.task}")
    if lora.rank:
        _check_lora(config)


def _check_lora(config: Config) -> None:
    if not config.lora.targets:
        raise UserError("'lora.targets' is empty; name the parts that get adapters, or set lora.rank=0")
    if config.optimizer.parts:
        raise UserError("'optimizer.parts' trains weights and 'lora.rank' adapters; set one of them")
    if not config.start:
        raise UserError("'lora.rank' adapts a trained model; name it in 'init_from', or set lora.rank=0")
    if config.trainer.precision == "bf16-true":
        raise UserError(
            "'trainer.precision' is bf16-true, in which the small steps of adapters round away; use 32-true, "
            "with lora.base=bf16 for a base in bfloat16"
        )
    if config.trainer.strategy in ("fsdp2", "model_parallel"):
        raise UserError(
            f"'trainer.strategy' is {config.trainer.strategy}, which shards weights that adapters leave "
            "frozen; use ddp"
        )


def _check_distillation(config: Config) -> None:
    options, lora = config.distillation, config.lora
    scales, steps = options.guidance, options.steps
    if not config.start:
        raise UserError("'task' is distillation, which starts from a trained model; name it in 'init_from'")
    if len(scales) != 2 or not 0 <= scales[0] <= scales[1]:
        raise UserError(
            f"'distillation.guidance' is {scales}; it must be two numbers from 0 up, the lower first"
        )
    if options.teacher_steps % steps or options.teacher_steps == steps:
        raise UserError(
            f"'distillation.teacher_steps' is {options.teacher_steps}; it must be a multiple of "
            f"'distillation.steps', {steps}, such as {3 * steps}"
        )
    if lora.rank and scales[0] != scales[1]:
        raise UserError(
            f"'distillation.guidance' is {scales}, but adapters have no input for it; give one scale twice, "
            f"such as [{DEFAULT_GUIDANCE}, {DEFAULT_GUIDANCE}]"
        )
    if lora.rank and "mapper" in lora.targets:
        raise UserError("'lora.targets' names 'mapper', which distillation leaves as it is; leave it out")


def _check_autoencoder(config: Config) -> None:
    weights, size = config.autoencoder_loss, config.model.image_size
    if weights.train == "decoder" and config.init_from in ("", NONE):
        raise UserError(
            "'autoencoder_loss.train' is 'decoder', but 'init_from' is empty or none; "
            "name the model whose decoder is to be trained"
        )
    if weights.discriminator_channels % 16:
        raise UserError(
            f"'autoencoder_loss.discriminator_channels' is {weights.discriminator_channels}; "
            "it must be a multiple of 16"
        )
    # strided layers halve, the two last ones take a pixel each and need one to be left
    smallest = 3 * 2**weights.discriminator_layers
    if weights.adversarial_weight and size < smallest:
        raise UserError(
            f"'model.image_size' is {size}; a discriminator of {weights.discriminator_layers} layers needs "
            f"at least {smallest}; lower autoencoder_loss.discriminator_layers"
        )
