"""The project's own layout: a folder with the model's configuration and one safetensors file a network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pbe.checkpoints.adapters import model_state
from pbe.checkpoints.key_map import PARTS, OpenedModel, check_shapes, native_shapes, part_of
from pbe.checkpoints.recognise import describe
from pbe.checkpoints.settings import KEY, UNSAID, Usage, read_json, usage_for, usage_from_json
from pbe.checkpoints.tensors import Lazies, cast, lazies
from pbe.checkpoints.weight_files import open_weights, write_safetensors
from pbe.config import ModelConfig, from_dict, to_dict
from pbe.errors import UserError
from pbe.files import staged
from pbe.models import LatentDiffusion

CONFIG_NAME = "config.json"
FORMAT = "pbe-native-1"
SHARED = "shared"  # key of the parts that another folder holds: their names, and that folder's relative path


def save_model(folder: str | Path, model: LatentDiffusion, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and ``{unet,autoencoder,exemplar_encoder}.safetensors``.

    Everything is written beside the folder's files first and takes their place at the end, so that a
    failure on the way leaves an older model as it was. ``dtype`` is that of the floating-point tensors in
    the files; None keeps each tensor's own.
    """
    state = {key: cast(value, dtype) for key, value in model_state(model).items()}
    with staged(Path(folder)) as staging:
        write_native(staging, model.config, state)


def write_native(folder: Path, config: ModelConfig, state: Lazies, usage: Usage = UNSAID) -> None:
    """Write the files of a native folder: the weights, the model's sizes and how it is to be run."""
    for part in PARTS:
        write_safetensors(folder / f"{part}.safetensors", part_of(state, part), {"format": FORMAT})
    usual = usage_for(config).complete("native").solver
    content = {"format": FORMAT, "model": to_dict(config)} | usage.section("native", usual)
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2))


def share_parts(folder: Path, other: Path, target: Path) -> list[str]:
    """Remove the networks of a native folder that are equal, tensor by tensor, to those of another one.

    ``config.json`` then names the other folder relative to ``target``, where the folder is going to lie. A
    student of few steps has a UNet of its own and nothing else. Returns the parts that are shared.
    """
    content, others = _read_config(folder), _read_config(other)
    shared = {}
    for part in PARTS:
        path, holder = _part_path(folder, part, content), _part_path(other, part, others)
        own, there = open_weights(path).tensors, open_weights(holder).tensors
        if own.keys() == there.keys() and all(torch.equal(own[key].read(), there[key].read()) for key in own):
            path.unlink()
            shared[part] = Path(os.path.relpath(holder.parent.resolve(), target.resolve())).as_posix()
    content[SHARED] = shared
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2))
    return list(shared)


def shared_files(folder: Path) -> dict[str, Path]:
    """Return the files of networks that another folder holds, by their path from this one.

    Whole models have none, and folders in other layouts.
    """
    path = folder / CONFIG_NAME
    content = read_json(path) if path.is_file() else {}
    paths = [_part_path(folder, part, content) for part in _shared_parts(folder, content)]
    return {Path(os.path.relpath(path, folder)).as_posix(): path for path in paths}


def load_config(folder: str | Path) -> ModelConfig:
    """Read the model's configuration of a native folder."""
    return _sizes(_read_config(Path(folder)), Path(folder) / CONFIG_NAME)


def _sizes(content: dict[str, Any], path: Path) -> ModelConfig:
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: it has no 'model' section; copy the model again")
    return from_dict(ModelConfig, content["model"], str(path))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"'{folder}' is not a model folder: it has no {CONFIG_NAME}")
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: not a model of this project (its format is not '{FORMAT}')")
    return content


def open_native(folder: Path, config: ModelConfig | None = None) -> OpenedModel:
    """Check the files of a native folder; no weight is read."""
    path = folder / CONFIG_NAME
    content = _read_config(folder) if config is None or path.is_file() else {}
    sizes = config or _sizes(content, path)
    native = native_shapes(sizes)
    tensors: Lazies = {}
    for part in PARTS:
        place, expected = _part_path(folder, part, content), part_of(native, part)
        found = open_weights(place).tensors
        check_shapes(found, expected, str(place), describe(found))
        tensors |= {f"{part}.{key}": found[key] for key in expected}
    return OpenedModel(str(folder), "native", sizes, tensors, usage=usage_from_json(content.get(KEY), path))


def _shared_parts(folder: Path, content: dict[str, Any]) -> dict[str, str]:
    """Return the networks that ``content`` of ``config.json`` says another folder holds, and that folder."""
    shared = content.get(SHARED, {})
    if not isinstance(shared, dict) or not all(isinstance(place, str) for place in shared.values()):
        raise UserError(f"{folder / CONFIG_NAME}: '{SHARED}' names no folders; copy the model again")
    return shared


def _part_path(folder: Path, part: str, content: dict[str, Any]) -> Path:
    """Return the file of a network, here or in a folder that it is shared with."""
    shared = _shared_parts(folder, content)
    path = folder / shared.get(part, "") / f"{part}.safetensors"
    if not path.is_file():
        where = f"; it is shared with '{shared[part]}', copy that too" if part in shared else ""
        raise UserError(f"'{folder}' is not a complete model: {path.name} is missing{where}")
    return path


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LatentDiffusion:
    """Load a native folder, strictly, in evaluation mode; ``dtype`` None means float32."""
    return open_native(Path(folder)).read(dtype or torch.float32).to(device)


def load_part(folder: Path, part: str, module: nn.Module) -> None:
    """Load one network of a native folder into ``module``, as float32, strictly."""
    path = _part_path(folder, part, _read_config(folder))
    found = open_weights(path).tensors
    check_shapes(found, lazies(module.state_dict()), str(path))
    module.load_state_dict({key: cast(value, torch.float32).read() for key, value in found.items()})


def check_keys(state: dict[str, Tensor], module: nn.Module, source: str) -> None:
    """Compare a state dict with what ``module`` expects, strictly."""
    check_shapes(lazies(state), lazies(module.state_dict()), source)
