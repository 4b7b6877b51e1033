"""Folders in diffusers' layout: a subfolder with a JSON for every network. The package itself is not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pbe.checkpoints.diffusers.config import read_autoencoder, read_encoder, read_schedule, read_unet
from pbe.checkpoints.diffusers.names import current_names, entries
from pbe.checkpoints.folders import ANY, FileChoice, open_folder, weight_files
from pbe.checkpoints.layout import PARTS, native_shapes, to_foreign, to_native
from pbe.checkpoints.opened import Opened
from pbe.checkpoints.recognise import describe, text_to_image
from pbe.checkpoints.settings import Settings, Values, read_json, reading
from pbe.checkpoints.strict import check_shapes, shapes
from pbe.checkpoints.tensors import Lazies
from pbe.checkpoints.usage import OWN_KEY, Usage, usage_from_json
from pbe.config import ModelConfig, ScheduleConfig
from pbe.errors import UserError

Subfolders = dict[str, Path]

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
    found = [path for path in sorted(folder.glob(f"*/{file}")) if path.parent.name != "safety_checker"]
    return read_json(found[0]) if found else None


def open_diffusers(
    folder: Path, parts: Subfolders, config: ModelConfig | None, choice: FileChoice = ANY
) -> Opened:
    """Translate a folder in diffusers' layout."""
    _check_complete(folder, parts)
    scheduler, preprocessor = (
        named(folder, "scheduler_config.json"),
        named(folder, "preprocessor_config.json"),
    )
    sizes = config or read_config(parts, scheduler, preprocessor)
    native = native_shapes(sizes)
    tensors: Lazies = {}
    for part in PARTS:
        tensors |= open_part(parts[part], part, sizes, native, choice)
    notes = [] if scheduler else ["no scheduler/: taken for the official noise schedule"]
    usage = replace(_noted(folder), scheduler=scheduler, preprocessor=preprocessor)
    return Opened(str(folder), "diffusers", sizes, tensors, tuple(notes), usage, _safety_checker(parts))


def _noted(folder: Path) -> Usage:
    """Read what a pipeline of this project noted in ``model_index.json``."""
    path = folder / "model_index.json"
    return usage_from_json(read_json(path).get(OWN_KEY) if path.is_file() else None, path)


def open_part(
    folder: Path, part: str, config: ModelConfig, native: Lazies, choice: FileChoice = ANY
) -> Lazies:
    """Open one network's subfolder; returns its weights under their native names."""
    found = current_names(part, open_folder(folder, choice).tensors)
    names = entries(part, config.exemplar_encoder, [key for key in native if key.startswith(f"{part}.")])
    check_shapes(shapes(found), shapes(to_foreign(names, native)), str(folder), describe(found))
    return to_native(names, found)


def _check_complete(folder: Path, parts: Subfolders) -> None:
    missing = [part for part in PARTS if part not in parts]
    if not missing:
        return
    if "text_encoder" in parts and "unet" in parts:
        inputs: Any = read_json(parts["unet"] / "config.json").get("in_channels")
        raise UserError(f"'{folder}' is not a Paint by Example model. {text_to_image(inputs)}")
    raise UserError(f"'{folder}' is not a complete model: it has no {' and no '.join(missing)}")


def _safety_checker(parts: Subfolders) -> Path | None:
    path = parts.get("safety_checker")
    return path if path is not None and (weight_files(path) or list(path.glob("*.index.json"))) else None


def read_config(parts: Subfolders, scheduler: Values | None, preprocessor: Values | None) -> ModelConfig:
    """Read the JSON files of all parts."""
    with reading(parts["unet"].parent):
        return _read_config(parts, scheduler, preprocessor)


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
