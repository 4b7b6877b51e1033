"""Checkpoints of the original: one state dict with everything in it, and a YAML beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from pbe.checkpoints.clip import POSITION_IDS, sizes_in_file, tower_sizes
from pbe.checkpoints.compvis.names import AUTOENCODER, CONDITION, TOWER, UNET, entries
from pbe.checkpoints.key_map import OpenedModel, converted, native_shapes, to_foreign, to_native
from pbe.checkpoints.recognise import TEXT, Sorted, Weights, choose, describe, left_out
from pbe.checkpoints.settings import KEY, Settings, Usage, Values, reading, usage_from_json
from pbe.checkpoints.tensors import Lazies, lazies
from pbe.checkpoints.weight_files import write_checkpoint, write_safetensors
from pbe.config import (
    AutoencoderConfig,
    ExemplarEncoderConfig,
    ModelConfig,
    ScheduleConfig,
    UNetConfig,
    load_config,
    loading,
)
from pbe.errors import UserError
from pbe.models.image_tower import follow_tower

ConfigSource = ModelConfig | str | Path | None
PARTS = {UNET: "UNet", AUTOENCODER: "autoencoder", CONDITION: "exemplar encoder"}


def schedule_buffers(schedule: ScheduleConfig) -> dict[str, Tensor]:
    """Return the twelve vectors of an original checkpoint that follow from its schedule, float32.

    Computed in float64 in the original's order of operations, so that they come out the same to the bit.
    """
    start, end = schedule.beta_start**0.5, schedule.beta_end**0.5
    betas = torch.linspace(start, end, schedule.timesteps, dtype=torch.float64).square().numpy()
    alphas = 1.0 - betas
    product = np.cumprod(alphas, axis=0)
    previous = np.append(1.0, product[:-1])
    variance = betas * (1.0 - previous) / (1.0 - product)
    buffers = {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(product),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - product),
        "log_one_minus_alphas_cumprod": np.log(1.0 - product),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / product),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / product - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - product),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(alphas) / (1.0 - product),
    }
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in buffers.items()}


BUFFERS = (*schedule_buffers(ScheduleConfig(timesteps=2)), "lvlb_weights", "logvar", "scale_factor")
# A tower's names without the level that transformers 5 leaves out.
SHORT_TOWER = re.compile(
    rf"^{re.escape(CONDITION)}transformer\.(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm)\.)"
)
# Left out without loss: what follows from the configuration, and the loss's own network.
DROPPED = (
    ("schedule buffers", re.compile(rf"(?:.*\.)?(?:{'|'.join(BUFFERS)})")),
    ("position indices", re.compile(rf"{re.escape(CONDITION)}.*{re.escape(POSITION_IDS)}")),
    ("weights of the training loss", re.compile(r"first_stage_model\.loss\..*")),
)


def clean(found: Sorted) -> tuple[Sorted, list[str]]:
    """Leave out what is not a weight, which the notes say, and bring the tower's names to those of 2022."""
    kept: Lazies = {}
    strangers: Lazies = {}
    counts: dict[str, int] = {}
    for table, names in ((kept, found.plain), (strangers, found.strangers)):
        for key, tensor in names.items():
            reason = next((reason for reason, pattern in DROPPED if pattern.fullmatch(key)), None)
            if reason is None:
                table[SHORT_TOWER.sub(TOWER, key)] = tensor
            else:
                counts[reason] = counts.get(reason, 0) + 1
    notes = [f"{count} {reason}" for reason, count in counts.items()]
    return Sorted(kept, found.average, strangers), [*notes, *left_out(strangers)]


def yaml_beside(path: Path) -> Path | None:
    """Return the YAML of a checkpoint: the only one of its folder, one with the file's stem, or its run's."""
    if path.is_dir():
        found = [*path.glob("*.yaml"), *path.glob("*.yml")]
        return found[0] if len(found) == 1 else None
    places = [path.with_suffix(".yaml"), path.with_suffix(".yml")]
    if path.parent.name == "checkpoints":
        places.append(path.parent.parent / "config.yaml")
    return next((place for place in places if place.is_file()), None)


def resolve_config(given: ConfigSource, path: Path, tensors: Lazies) -> tuple[ModelConfig, list[str]]:
    """Return the sizes of a model without any of its own, and a note where they were assumed.

    ``given`` None takes the YAML beside the weights, and the official sizes without one; a YAML is this
    project's or the original's. ``tensors`` are the state dict, cleaned.
    """
    if isinstance(given, ModelConfig):
        return given, []
    source = Path(given) if given is not None else yaml_beside(path)
    if source is None:
        return ModelConfig(), ["no configuration beside it: taken for the official sizes"]
    content = read_yaml(source)
    if not is_original_yaml(content):
        return load_config(source).model, []
    if not any(key.startswith(TOWER) for key in tensors):
        raise UserError(f"{path}: no image tower in it. {describe(tensors)}")
    with reading(source):
        return _read_model(content["model"]["params"], str(source), tensors), []


def open_compvis(
    path: Path, weights: Weights, found: Sorted, config: ConfigSource, *, raw_weights: bool = False
) -> OpenedModel:
    """Translate an original checkpoint; ``found`` is its state dict, ``config`` as for resolve_config."""
    whole = found.plain | found.strangers
    found, dropped = clean(found)
    sizes, assumed = resolve_config(config, path, found.plain)
    names = entries(sizes, list(native := native_shapes(sizes)))
    expected = [key for entry in names for key in entry.foreign]
    tensors, said = choose(found, expected, weights.source, raw_weights=raw_weights)
    hint = describe(whole)
    if assumed and not any(key.startswith(TEXT) for key in whole):
        folder = path if path.is_dir() else path.parent
        beside = ", ".join(sorted(p.name for p in folder.glob("*.y*ml")))
        hint += " The official sizes were assumed; give its own as config" + (beside and f" ({beside}?)")
    native_tensors = to_native(names, tensors, native, weights.source, hint, PARTS)
    _check_schedule(whole, sizes.schedule, weights.source)
    if weights.extra:
        dropped.append(f"{', '.join(weights.extra)} ({weights.extra_bytes / 1e6:,.1f} MB, not read)")
    notes = (*said, *weights.notes, *dropped, *assumed)
    return OpenedModel(weights.source, "compvis", sizes, native_tensors, notes, _usage(config, path))


def _check_schedule(tensors: Lazies, schedule: ScheduleConfig, source: str) -> None:
    """Compare the betas in a checkpoint, where it has them, with the configuration's, to half precision."""
    given = next((tensor for key, tensor in tensors.items() if key.rpartition(".")[2] == "betas"), None)
    if given is None:
        return
    found, wanted = given.read().float().flatten(), schedule_buffers(schedule)["betas"]
    first, last = (found[place].sum() for place in (slice(1), slice(-1, None)))
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=5e-3, atol=0.0):
        raise UserError(
            f"{source}: trained with another noise schedule ({len(found)} timesteps, betas {first:.6g} to "
            f"{last:.6g}) than the configuration says; give the one it was trained with"
        )


def _usage(given: ConfigSource, path: Path) -> Usage:
    """Read what the YAML of a checkpoint says of how the model is to be run."""
    source = Path(given) if isinstance(given, str | Path) else yaml_beside(path)
    content: Any = None if source is None else read_yaml(source)
    return usage_from_json(content.get(KEY) if is_original_yaml(content) else None, str(source))


def original_weights(config: ModelConfig, native: Lazies) -> Lazies:
    """Return the weights under the original's names."""
    return to_foreign(entries(config, list(native)), native)


def derived_buffers(config: ModelConfig, native: Lazies) -> Lazies:
    """Return what an original checkpoint holds beside the weights: schedule buffers and position indices."""
    positions = native["exemplar_encoder.tower.positional_embedding"].shape[0]
    indices = {TOWER + POSITION_IDS: torch.arange(positions)[None]}
    return lazies(schedule_buffers(config.schedule) | indices)


def write_original(
    path: Path, yaml: Path, config: ModelConfig, native: Lazies, dtype: torch.dtype | None, usage: Usage
) -> None:
    """Write one file in the original's layout, and its YAML, which also says how the model is to be run.

    The file is of safetensors if it is called so, else a checkpoint of torch; the schedule in it is float32
    whatever ``dtype``. The original's code does not read the section that the YAML has in addition.
    """
    weights, buffers = original_weights(config, native), derived_buffers(config, native)
    stored = converted(weights, dtype) | converted(buffers, None)
    if path.suffix == ".safetensors":
        write_safetensors(path, stored, {"format": "pt"})
    else:
        write_checkpoint(path, stored, {"global_step": 0, "epoch": 0})
    OmegaConf.save(OmegaConf.create(write_config(config) | usage.section("compvis")), yaml)


UNET_FIXED: Values = {
    "conv_resample": True, "dims": 2, "dropout": 0, "legacy": False, "num_classes": None, "n_embed": None,
    "num_head_channels": -1, "num_heads_upsample": -1, "resblock_updown": False, "transformer_depth": 1,
    "use_linear_in_transformer": False, "use_scale_shift_norm": False, "use_spatial_transformer": True,
    "add_conv_in_front_of_unet": False,
}  # fmt: skip
AUTOENCODER_FIXED: Values = {
    "attn_resolutions": [], "double_z": True, "in_channels": 3, "out_ch": 3, "dropout": 0.0,
}  # fmt: skip
PREDICTIONS = ("eps", "v")


def is_original_yaml(content: Any) -> bool:
    """Tell whether the content of a YAML file has the original's structure."""
    model = content.get("model") if isinstance(content, dict) else None
    params = model.get("params") if isinstance(model, dict) else None
    return isinstance(params, dict) and "unet_config" in params


def read_yaml(path: Path) -> Any:
    """Read a YAML file as plain containers; errors as in :func:`pbe.config.loading.read_yaml`."""
    return OmegaConf.to_container(loading.read_yaml(path), resolve=False)


def _read_model(params: Values, source: str, tensors: Lazies) -> ModelConfig:
    """Read the sizes of an original YAML; those of the tower, which it does not give, are the weights'."""
    official = ScheduleConfig()
    root = Settings(params, source)
    unet = Settings(params["unet_config"].get("params", {}), f"{source}: unet_config")
    first = params.get("first_stage_config", {}).get("params", {})
    autoencoder = _read_autoencoder(Settings(first.get("ddconfig", {}), f"{source}: ddconfig"))
    autoencoder.scale_factor = root.real("scale_factor", autoencoder.scale_factor)
    if first.get("embed_dim", autoencoder.latent_channels) != autoencoder.latent_channels:
        raise UserError(f"{source}: 'embed_dim' is {first['embed_dim']}; it must equal 'z_channels'")
    factor = 2 ** (len(autoencoder.channel_mult) - 1)
    encoder = params.get("cond_stage_config", {}).get("params") or {}
    prediction = params.get("parameterization", "eps")
    if prediction not in PREDICTIONS:
        root.refuse(f"'parameterization' is {prediction}; this model has eps and v only")
    return ModelConfig(
        image_size=factor * root.number("image_size", 64),
        prediction=prediction,
        schedule=ScheduleConfig(
            root.number("timesteps", official.timesteps),
            root.real("linear_start", official.beta_start),
            root.real("linear_end", official.beta_end),
        ),
        unet=_read_unet(unet),
        autoencoder=autoencoder,
        exemplar_encoder=_read_encoder(Settings(encoder, f"{source}: cond_stage_config"), tensors),
    )


def _read_unet(settings: Settings) -> UNetConfig:
    settings.fixed(UNET_FIXED)
    return UNetConfig(
        model_channels=settings.number("model_channels"),
        channel_mult=list(settings.get("channel_mult", [1, 2, 4, 8])),
        num_res_blocks=settings.number("num_res_blocks"),
        attention_factors=sorted(settings.get("attention_resolutions")),
        num_heads=settings.number("num_heads"),
        context_dim=settings.number("context_dim"),
        time_embed_mult=settings.number("time_embed_mult", 4),
        norm_groups=settings.number("norm_groups", 32),
    )


def _read_autoencoder(settings: Settings) -> AutoencoderConfig:
    settings.fixed(AUTOENCODER_FIXED)
    return AutoencoderConfig(
        channels=settings.number("ch"),
        channel_mult=list(settings.get("ch_mult", [1, 2, 4, 8])),
        num_res_blocks=settings.number("num_res_blocks"),
        latent_channels=settings.number("z_channels"),
        norm_groups=settings.number("norm_groups", 32),
        mid_attention=bool(settings.get("mid_attention", True)),
    )


def _read_encoder(settings: Settings, tensors: Lazies) -> ExemplarEncoderConfig:
    mapper = [key for key in tensors if key.startswith(f"{CONDITION}mapper.resblocks.")]
    if f"{TOWER}embeddings.patch_embedding.weight" not in tensors or not mapper:
        raise UserError(f"{settings.source}: the checkpoint has no image tower with a mapper behind it")
    values = settings.values
    quick_gelu = values.get("hidden_act", "quick_gelu") == "quick_gelu"
    heads = settings.number("num_attention_heads") if "num_attention_heads" in values else None
    sizes, image_size = sizes_in_file(tensors, TOWER, heads=heads, quick_gelu=quick_gelu)
    fc, width = tensors[f"{CONDITION}mapper.resblocks.0.mlp.c_fc.weight"].shape
    return ExemplarEncoderConfig(
        tower=sizes.name,
        image_size=image_size,
        mean=list(settings.get("mean", [])),  # the tower's own, which are CLIP's
        std=list(settings.get("std", [])),
        mapper_layers=len({key.split(".")[3] for key in mapper}),
        mapper_heads=settings.number("mapper_heads", 1),
        mapper_mlp_ratio=fc // width,
    )


def write_config(config: ModelConfig) -> Values:
    """Return the content of an original YAML.

    What the original has no setting for is added only where the model departs from it: its classes refuse
    such a setting, so that nothing is computed in another way unnoticed.
    """
    autoencoder, encoder = config.autoencoder, _write_encoder(config.exemplar_encoder)
    params: Values = {
        "linear_start": config.schedule.beta_start,
        "linear_end": config.schedule.beta_end,
        "timesteps": config.schedule.timesteps,
        "first_stage_key": "inpaint",
        "cond_stage_key": "image",
        "image_size": config.image_size // 2 ** (len(autoencoder.channel_mult) - 1),
        "channels": autoencoder.latent_channels,
        "cond_stage_trainable": True,
        "conditioning_key": "crossattn",
        "u_cond_percent": 0.2,
        "scale_factor": autoencoder.scale_factor,
        "use_ema": False,
        **_departures(parameterization=(config.prediction, "eps")),
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": _write_unet(config),
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL", "params": _write_autoencoder(autoencoder),
        },
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPImageEmbedder",
            **({"params": encoder} if encoder else {}),
        },
    }  # fmt: skip
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def _departures(**values: tuple[Any, Any]) -> Values:
    """Return those of the (value, original's value) that differ."""
    return {key: value for key, (value, usual) in values.items() if value != usual}


def _write_unet(config: ModelConfig) -> Values:
    unet, latents = config.unet, config.autoencoder.latent_channels
    return {
        "image_size": 32,  # unused there, but wanted
        "in_channels": 2 * latents + 1,
        "out_channels": latents,
        "model_channels": unet.model_channels,
        "attention_resolutions": sorted(unet.attention_factors, reverse=True),
        "num_res_blocks": unet.num_res_blocks,
        "channel_mult": list(unet.channel_mult),
        "num_heads": unet.num_heads,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": unet.context_dim,
        "use_checkpoint": True,
        "legacy": False,
        **_departures(time_embed_mult=(unet.time_embed_mult, 4), norm_groups=(unet.norm_groups, 32)),
    }


def _write_autoencoder(config: AutoencoderConfig) -> Values:
    sizes = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.channels,
        "ch_mult": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
        **_departures(norm_groups=(config.norm_groups, 32), mid_attention=(config.mid_attention, True)),
    }
    return {
        "embed_dim": config.latent_channels,
        "monitor": "val/rec_loss",
        "ddconfig": sizes,
        "lossconfig": {"target": "torch.nn.Identity"},
    }


def _write_encoder(config: ExemplarEncoderConfig) -> Values:
    sizes, official = tower_sizes(config), ExemplarEncoderConfig()
    follow_tower(official)
    return _departures(
        num_attention_heads=(sizes.heads, max(4, sizes.width // 64)),
        hidden_act=("quick_gelu" if sizes.quick_gelu else "gelu", "quick_gelu"),
        mean=(list(config.mean), official.mean),
        std=(list(config.std), official.std),
        mapper_heads=(config.mapper_heads, 1),
    )
