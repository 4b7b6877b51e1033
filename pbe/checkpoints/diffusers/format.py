"""Folders in diffusers' layout: a subfolder with a JSON for every network. The package itself is not used."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pbe.checkpoints.clip import tower_sizes, vision_config
from pbe.checkpoints.diffusers.names import current_names, entries
from pbe.checkpoints.diffusers.scheduler import BETAS
from pbe.checkpoints.folders import ANY, CHECKER, FileChoice, open_folder, weight_files
from pbe.checkpoints.key_map import (
    PARTS,
    OpenedModel,
    converted,
    keys_of,
    native_shapes,
    to_foreign,
    to_native,
)
from pbe.checkpoints.recognise import describe, text_to_image
from pbe.checkpoints.settings import OWN_KEY, Settings, Usage, Values, read_json, reading, usage_from_json
from pbe.checkpoints.tensors import Lazies
from pbe.checkpoints.weight_files import write_safetensors
from pbe.config import AutoencoderConfig, ExemplarEncoderConfig, ModelConfig, ScheduleConfig, UNetConfig
from pbe.errors import UserError
from pbe.models.image_tower import TowerSizes

WEIGHT_FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "autoencoder": "vae/diffusion_pytorch_model.safetensors",
    "exemplar_encoder": "image_encoder/model.safetensors",
}
JSON_FILES = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "image_encoder/config.json",
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
)

ROLES: dict[str, Callable[[Values], bool]] = {
    "unet": lambda values: values.get("_class_name") == "UNet2DConditionModel",
    "autoencoder": lambda values: values.get("_class_name") == "AutoencoderKL",
    "exemplar_encoder": lambda values: (
        values.get("model_type") == "clip_vision_model"
        or "PaintByExampleImageEncoder" in (values.get("architectures") or ())
    ),
    "text_encoder": lambda values: values.get("model_type") in ("clip_text_model", "t5"),
    "safety_checker": lambda values: "StableDiffusionSafetyChecker" in (values.get("architectures") or ()),
}


def find_parts(folder: Path) -> dict[str, Path]:
    """Return the subfolders that hold a network, by what their ``config.json`` says that it is."""
    parts: dict[str, Path] = {}
    for path in sorted(folder.glob("*/config.json")):
        values = read_json(path)
        with reading(path):
            role = next((role for role, fits in ROLES.items() if fits(values)), None)
        if role is not None:
            parts.setdefault(role, path.parent)
    return parts


def named(folder: Path, file: str) -> Values | None:
    """Return the JSON of this name in the first subfolder that has one and is not the safety checker's."""
    found = [path for path in sorted(folder.glob(f"*/{file}")) if path.parent.name != CHECKER]
    return read_json(found[0]) if found else None


def open_diffusers(
    folder: Path, parts: dict[str, Path], config: ModelConfig | None, choice: FileChoice = ANY
) -> OpenedModel:
    """Translate a folder in diffusers' layout, whose networks lie in ``parts``."""
    if missing := [part for part in PARTS if part not in parts]:
        if "text_encoder" in parts and "unet" in parts:
            inputs: Any = read_json(parts["unet"] / "config.json").get("in_channels")
            raise UserError(f"'{folder}' is not a Paint by Example model. {text_to_image(inputs)}")
        raise UserError(f"'{folder}' is not a complete model: it has no {' and no '.join(missing)}")
    scheduler, preprocessor = (named(folder, f"{name}_config.json") for name in ("scheduler", "preprocessor"))
    if config is None:
        with reading(folder):
            config = _read_config(parts, scheduler, preprocessor)
    native = native_shapes(config)
    tensors: Lazies = {}
    for part in PARTS:
        found = current_names(part, open_folder(parts[part], choice).tensors)
        names = entries(part, config.exemplar_encoder, keys_of(native, part))
        tensors |= to_native(names, found, native, str(parts[part]), describe(found))
    notes = () if scheduler else ("no scheduler/: taken for the official noise schedule",)
    index = folder / "model_index.json"
    usage = usage_from_json(read_json(index).get(OWN_KEY) if index.is_file() else None, index)
    usage = replace(usage, scheduler=scheduler, preprocessor=preprocessor)
    checker = parts.get("safety_checker")
    if checker is not None and not (weight_files(checker) or list(checker.glob("*.index.json"))):
        checker = None
    return OpenedModel(str(folder), "diffusers", config, tensors, notes, usage, checker)


def _read_config(
    parts: dict[str, Path], scheduler: Values | None, preprocessor: Values | None
) -> ModelConfig:
    unet, autoencoder, encoder = (
        Settings(read_json(parts[part] / "config.json"), str(parts[part] / "config.json")) for part in PARTS
    )
    schedule, prediction = ScheduleConfig(), "eps"
    if scheduler is not None:
        schedule, prediction = read_schedule(Settings(scheduler, "scheduler_config.json"))
    sizes = ModelConfig(
        prediction=prediction,
        schedule=schedule,
        unet=read_unet(unet),
        autoencoder=read_autoencoder(autoencoder),
        exemplar_encoder=read_encoder(encoder, preprocessor),
    )
    factor = 2 ** (len(sizes.autoencoder.channel_mult) - 1)
    sizes.image_size = factor * unet.number("sample_size", 64)
    inputs = unet.number("in_channels", 4)
    if inputs != 2 * sizes.autoencoder.latent_channels + 1:
        unet.refuse(f"'in_channels' is {inputs}. {text_to_image(inputs)}")
    if (width := encoder.number("projection_dim", 512)) != sizes.unet.context_dim:
        encoder.refuse(
            f"'projection_dim' is {width}, but the UNet's context is {sizes.unet.context_dim} wide"
        )
    return sizes


def write_diffusers(
    folder: Path, config: ModelConfig, native: Lazies, dtype: torch.dtype | None, usage: Usage, checker: bool
) -> None:
    """Write the files of a pipeline's folder; see :func:`pbe.checkpoints.saving.write_layout`."""
    scheduler = write_scheduler(config, usage.scheduler_config())
    preprocessor = write_preprocessor(config, usage.preprocessor)
    contents = (
        write_index(scheduler, safety_checker=checker, noted=usage.section("diffusers")),
        write_unet(config),
        write_autoencoder(config),
        write_encoder(config, preprocessor),
        preprocessor,
        scheduler,
    )
    for name, content in zip(JSON_FILES, contents, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for part, name in WEIGHT_FILES.items():
        names = entries(part, config.exemplar_encoder, keys_of(native, part))
        write_safetensors(folder / name, converted(to_foreign(names, native), dtype), {"format": "pt"})


# Where a setting has one value only that this model can take: anything else would compute something else.
UNET_FIXED: Values = {
    "act_fn": "silu", "addition_embed_type": None, "attention_type": "default", "center_input_sample": False,
    "class_embed_type": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "downsample_padding": 1, "dual_cross_attention": False, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "num_class_embeds": None,
    "only_cross_attention": False, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_type": "positional", "timestep_post_act": None, "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}  # fmt: skip
UNET_WRITTEN = (
    "act_fn", "center_input_sample", "downsample_padding", "flip_sin_to_cos", "freq_shift",
    "mid_block_scale_factor", "norm_eps", "use_linear_projection",
)  # fmt: skip
VAE_FIXED: Values = {
    "act_fn": "silu", "in_channels": 3, "out_channels": 3, "latents_mean": None, "latents_std": None,
    "shift_factor": None, "use_post_quant_conv": True, "use_quant_conv": True,
}  # fmt: skip
ENCODER_FIXED: Values = {"layer_norm_eps": 1e-5, "num_channels": 3}
ENCODER_WRITTEN: Values = {
    "architectures": ["PaintByExampleImageEncoder"], "attention_dropout": 0.0,
    "initializer_factor": 1.0, "initializer_range": 0.02,  # unused, but transformers looks for both
    "model_type": "clip_vision_model", "torch_dtype": "float32",
}  # fmt: skip
SCHEDULE_FIXED: Values = {"beta_schedule": "scaled_linear", "trained_betas": None}
SCHEDULE_MISSING = {"beta_schedule": "linear"}  # what diffusers takes where nothing is said
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
CHECKER_CLASS = "StableDiffusionSafetyChecker"


def read_unet(settings: Settings) -> UNetConfig:
    """Read ``unet/config.json``; the number of input channels is checked with the weights."""
    settings.fixed(UNET_FIXED)
    channels, mult = settings.channels()
    down, up = settings.get("down_block_types"), settings.get("up_block_types")
    with_attention = [kind == "CrossAttnDownBlock2D" for kind in down]
    wanted_down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in with_attention]
    wanted_up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(with_attention)]
    if list(down) != wanted_down or list(up) != wanted_up or len(down) != len(mult):
        settings.refuse("'down_block_types' and 'up_block_types' name blocks that this model does not have")
    # what diffusers calls the dimension of the heads is their number, unless the number is given too
    heads = settings.number("num_attention_heads", settings.number("attention_head_dim", 8))
    time_width = settings.number("time_embedding_dim", 4 * channels)
    if time_width % channels:
        settings.refuse(f"'time_embedding_dim' is {time_width}; it must be a multiple of {channels}")
    return UNetConfig(
        model_channels=channels,
        channel_mult=mult,
        num_res_blocks=settings.number("layers_per_block", 2),
        attention_factors=[2**level for level, attention in enumerate(with_attention) if attention],
        num_heads=heads,
        context_dim=settings.number("cross_attention_dim", 1280),
        time_embed_mult=time_width // channels,
        norm_groups=settings.number("norm_num_groups", 32),
    )


def read_autoencoder(settings: Settings) -> AutoencoderConfig:
    """Read ``vae/config.json``."""
    settings.fixed(VAE_FIXED)
    channels, mult = settings.channels()
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if settings.get(key) != [kind] * len(mult):
            settings.refuse(f"'{key}' names blocks that this model does not have; it has {kind} only")
    return AutoencoderConfig(
        channels=channels,
        channel_mult=mult,
        num_res_blocks=settings.number("layers_per_block", 1),
        latent_channels=settings.number("latent_channels", 4),
        norm_groups=settings.number("norm_num_groups", 32),
        mid_attention=bool(settings.get("mid_block_add_attention", True)),
        scale_factor=settings.real("scaling_factor", 0.18215),
    )


def read_encoder(settings: Settings, preprocessor: Values | None) -> ExemplarEncoderConfig:
    """Read ``image_encoder/config.json``, and mean and deviation of the preprocessor if there is one."""
    settings.fixed(ENCODER_FIXED)
    activation = settings.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        settings.refuse(f"'hidden_act' is {json.dumps(activation)}; this model has quick_gelu and gelu")
    sizes = TowerSizes(
        width=settings.number("hidden_size"),
        layers=(layers := settings.number("num_hidden_layers")),
        patch=settings.number("patch_size"),
        heads=settings.number("num_attention_heads"),
        mlp=settings.number("intermediate_size"),
        quick_gelu=activation == "quick_gelu",
    )
    official, facts = ExemplarEncoderConfig(), preprocessor or {}
    return ExemplarEncoderConfig(
        tower=sizes.name,
        image_size=settings.number("image_size", 224),
        mean=[float(value) for value in settings.get("image_mean", facts.get("image_mean", official.mean))],
        std=[float(value) for value in settings.get("image_std", facts.get("image_std", official.std))],
        # theirs always has a fifth of the tower's layers and these numbers; what differs is written beside
        mapper_layers=int(settings.values.get("mapper_layers", (layers + 1) // 5)),
        mapper_heads=settings.number("mapper_heads", 1),
        mapper_mlp_ratio=settings.number("mapper_mlp_ratio", 4),
    )


def read_schedule(settings: Settings) -> tuple[ScheduleConfig, str]:
    """Read ``scheduler/scheduler_config.json``: the noise schedule, and what the network predicts.

    Betas that are missing are those of the scheduler's class, as diffusers has it.
    """
    Settings(SCHEDULE_MISSING | settings.values, settings.source).fixed(SCHEDULE_FIXED)
    prediction = settings.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        settings.refuse(
            f"'prediction_type' is {json.dumps(prediction)}; this model has epsilon and v_prediction"
        )
    start, end = BETAS.get(str(settings.values.get("_class_name")), (None, None))
    schedule = ScheduleConfig(
        timesteps=settings.number("num_train_timesteps", 1000),
        beta_start=settings.real("beta_start", start),
        beta_end=settings.real("beta_end", end),
    )
    return schedule, PREDICTIONS[prediction]


def write_unet(config: ModelConfig) -> Values:
    """Return ``unet/config.json``."""
    unet, latents = config.unet, config.autoencoder.latent_channels
    attention = [2**level in unet.attention_factors for level in range(len(unet.channel_mult))]
    values = {
        **{key: UNET_FIXED[key] for key in UNET_WRITTEN},
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": unet.num_heads,
        "block_out_channels": [unet.model_channels * mult for mult in unet.channel_mult],
        "cross_attention_dim": unet.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "in_channels": 2 * latents + 1,
        "layers_per_block": unet.num_res_blocks,
        "norm_num_groups": unet.norm_groups,
        "out_channels": latents,
        "sample_size": config.image_size // 2 ** (len(config.autoencoder.channel_mult) - 1),
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
    }
    if unet.time_embed_mult != 4:
        values["time_embedding_dim"] = unet.time_embed_mult * unet.model_channels
    return values


def write_autoencoder(config: ModelConfig) -> Values:
    """Return ``vae/config.json``."""
    autoencoder, levels = config.autoencoder, len(config.autoencoder.channel_mult)
    values: Values = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [autoencoder.channels * mult for mult in autoencoder.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": autoencoder.latent_channels,
        "layers_per_block": autoencoder.num_res_blocks,
        "norm_num_groups": autoencoder.norm_groups,
        "out_channels": 3,
        "sample_size": config.image_size,
        "scaling_factor": autoencoder.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    return values if autoencoder.mid_attention else values | {"mid_block_add_attention": False}


def write_encoder(config: ModelConfig, preprocessor: Values) -> Values:
    """Return ``image_encoder/config.json``, with mean and deviation where the preprocessor has others."""
    encoder, sizes = config.exemplar_encoder, tower_sizes(config.exemplar_encoder)
    values: Values = {
        **ENCODER_FIXED,
        **ENCODER_WRITTEN,
        **vision_config(sizes, encoder.image_size),
        "projection_dim": config.unet.context_dim,
    }
    usual = {"mapper_layers": (sizes.layers + 1) // 5, "mapper_heads": 1, "mapper_mlp_ratio": 4}
    values |= {key: getattr(encoder, key) for key, value in usual.items() if getattr(encoder, key) != value}
    statistics = {"image_mean": list(encoder.mean), "image_std": list(encoder.std)}
    return values | {key: value for key, value in statistics.items() if preprocessor.get(key, value) != value}


def write_preprocessor(config: ModelConfig, preprocessor: Values | None = None) -> Values:
    """Return ``preprocessor_config.json``: the one given, or CLIP's resize and crop at the tower's size."""
    if preprocessor:
        return preprocessor
    encoder = config.exemplar_encoder
    return preprocessor_config(encoder.image_size, encoder.image_size, 3, encoder.mean, encoder.std)


def preprocessor_config(
    edge: int, crop: int, resample: int, mean: Sequence[float], std: Sequence[float]
) -> Values:
    """Return the settings of CLIP's processor; ``edge`` 0 resizes nothing, ``resample`` is Pillow's."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": bool(edge),
        "size": {"shortest_edge": edge or crop},
        "resample": resample,
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": True,
    }


def write_scheduler(config: ModelConfig, scheduler: Values) -> Values:
    """Return ``scheduler_config.json``: ``scheduler`` with the model's noise schedule and prediction."""
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    return scheduler | {
        "beta_end": config.schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "beta_start": config.schedule.beta_start,
        "num_train_timesteps": config.schedule.timesteps,
        "prediction_type": names[config.prediction],
    }


def write_index(scheduler: Values, *, safety_checker: bool = False, noted: Values | None = None) -> Values:
    """Return ``model_index.json``."""
    return {
        "_class_name": "PaintByExamplePipeline",
        "_diffusers_version": "0.10.0.dev0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["paint_by_example", "PaintByExampleImageEncoder"],
        "requires_safety_checker": False,
        "safety_checker": ["stable_diffusion", CHECKER_CLASS] if safety_checker else [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **(noted or {}),
    }
