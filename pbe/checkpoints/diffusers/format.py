"""Folders in diffusers' layout: a subfolder with a JSON for every network. The package itself is not used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pbe.checkpoints.diffusers.config import (
    read_autoencoder,
    read_encoder,
    read_schedule,
    read_unet,
    write_autoencoder,
    write_encoder,
    write_index,
    write_preprocessor,
    write_scheduler,
    write_unet,
)
from pbe.checkpoints.diffusers.names import current_names, entries
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
from pbe.checkpoints.writers import write_safetensors
from pbe.config import ModelConfig, ScheduleConfig
from pbe.errors import UserError

Subfolders = dict[str, Path]
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


def find_parts(folder: Path) -> Subfolders:
    """Return the subfolders that hold a network, by what their ``config.json`` says that it is."""
    parts: Subfolders = {}
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
    folder: Path, parts: Subfolders, config: ModelConfig | None, choice: FileChoice = ANY
) -> OpenedModel:
    """Translate a folder in diffusers' layout, whose networks lie in ``parts``."""
    _check_complete(folder, parts)
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
    usage = replace(_noted(folder), scheduler=scheduler, preprocessor=preprocessor)
    checker = parts.get("safety_checker")
    if checker is not None and not (weight_files(checker) or list(checker.glob("*.index.json"))):
        checker = None
    return OpenedModel(str(folder), "diffusers", config, tensors, notes, usage, checker)


def _noted(folder: Path) -> Usage:
    """Read what a pipeline of this project noted in ``model_index.json``."""
    path = folder / "model_index.json"
    return usage_from_json(read_json(path).get(OWN_KEY) if path.is_file() else None, path)


def _check_complete(folder: Path, parts: Subfolders) -> None:
    missing = [part for part in PARTS if part not in parts]
    if not missing:
        return
    if "text_encoder" in parts and "unet" in parts:
        inputs: Any = read_json(parts["unet"] / "config.json").get("in_channels")
        raise UserError(f"'{folder}' is not a Paint by Example model. {text_to_image(inputs)}")
    raise UserError(f"'{folder}' is not a complete model: it has no {' and no '.join(missing)}")


def _read_config(parts: Subfolders, scheduler: Values | None, preprocessor: Values | None) -> ModelConfig:
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
