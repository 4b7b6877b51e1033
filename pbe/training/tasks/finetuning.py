"""Which part of a model is trained: chosen parts, or low-rank adapters beside frozen weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import nn

from pbe.config import Config, ModelConfig, UNetConfig
from pbe.config.checks import check_values
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.adapters import add_adapter, layers_of
from pbe.models.image_tower import follow_tower
from pbe.models.int8 import named_weights, quantise
from pbe.training.optimization.sharding import local

SAMPLED = 4096  # numbers of each weight that go into the fingerprint
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}  # types of the computation


def undistilled(unet: UNetConfig) -> UNetConfig:
    """Return the sizes of a UNet without what distillation sets."""
    return replace(unet, guidance_range=[], few_steps=0)


def check_undistilled(model: LatentDiffusion, config: Config) -> None:
    """Refuse a few-step model: training would undo its distillation, and it has no flow to teach."""
    unet = model.config.unet
    if unet == undistilled(unet):
        return
    if not config.start:
        raise UserError(
            "'model.unet.guidance_range' and 'model.unet.few_steps' are what task=distillation sets; "
            "leave them out"
        )
    steps = f"for {unet.few_steps} steps" if unet.few_steps else "to take the guidance scale as an input"
    raise UserError(f"init_from '{config.init_from}' was distilled, {steps}; name the model it came from")


def _check_alive(model: LatentDiffusion, parts: list[str]) -> None:
    if "cross_attention_keys" in parts and model.config.exemplar_encoder.tokens == "class":
        raise UserError(
            "with one condition token queries and keys of the cross-attention have no influence; "
            "leave cross_attention_keys out"
        )


def train_parts(model: LatentDiffusion, parts: list[str]) -> None:
    """Freeze all weights but those of the named parts."""
    _check_alive(model, parts)
    chosen = [p for layer in layers_of(model, parts).values() for p in layer.parameters()]
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)


def train_adapters(model: LatentDiffusion, config: Config) -> None:
    """Freeze all weights and add trainable adapters to the configuration's targets.

    UNet and bottleneck are converted to the base's type, or 8 bits; autoencoder and tower keep theirs, so
    that latents and features do not change and an existing latent cache fits.
    """
    options, encoder = config.lora, model.exemplar_encoder
    _check_alive(model, options.targets)
    model.requires_grad_(False)
    bottleneck = [child for name, child in encoder.named_children() if name != "tower"]
    for module in (model.unet, *bottleneck):
        module.to(TYPES[options.base])
        if options.base == "int8":
            quantise(module)
    encoder.null_condition.data = encoder.null_condition.data.to(TYPES[options.base])
    generator = torch.Generator().manual_seed(config.seed)
    add_adapter(model, options.targets, options.rank, options.alpha, generator=generator)


def follow_model(config: Config, stored: ModelConfig) -> Config:
    """Return a configuration with the model section of ``init_from``, at the data's resolution."""
    size = config.data.image_size or stored.image_size
    model = replace(stored, image_size=size, exemplar_encoder=replace(stored.exemplar_encoder))
    follow_tower(model.exemplar_encoder)
    data = replace(config.data, image_size=size, exemplar_size=model.exemplar_encoder.image_size)
    found = replace(config, model=model, data=data)
    check_values(replace(found, model_from_init=False))
    return found


def fingerprint_of_frozen(model: nn.Module) -> str:
    """Return a fingerprint of the frozen weights: a hash of evenly spaced numbers of each."""
    digest = hashlib.sha256()
    for name, weight in named_weights(model):
        if weight.requires_grad:
            continue
        flat = local(weight.detach()).flatten()
        step = max(len(flat) // SAMPLED, 1)
        digest.update(name.encode() + flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()
