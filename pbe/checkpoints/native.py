"""The project's own layout: a folder with the model's configuration and one safetensors file a network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pbe.checkpoints.layout import PARTS, native_shapes
from pbe.checkpoints.opened import Opened, build
from pbe.checkpoints.readers import open_weights
from pbe.checkpoints.recognise import describe
from pbe.checkpoints.settings import read_json
from pbe.checkpoints.strict import check_shapes, shapes
from pbe.checkpoints.tensors import Lazies, cast, lazies
from pbe.checkpoints.usage import KEY, UNSAID, Usage, usage_from_json
from pbe.checkpoints.writers import Read, staged, write_safetensors
from pbe.config import ModelConfig, from_dict, to_dict
from pbe.errors import UserError
from pbe.models import LatentDiffusion

CONFIG_NAME = "config.json"
FORMAT = "pbe-native-1"


def save_model(folder: str | Path, model: LatentDiffusion, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and ``{unet,autoencoder,exemplar_encoder}.safetensors``.

    Everything is written beside the folder's files first and takes their place at the end, so that a
    failure on the way leaves an older model as it was.

    Args:
        folder: made when missing.
        model: the weights.
        dtype: type of the floating-point tensors in the files; None keeps each tensor's own.
    """
    with staged(Path(folder)) as staging:
        for part in PARTS:
            save_part(staging, part, getattr(model, part), dtype)
        write_config(staging, model.config)


def save_part(folder: Path, part: str, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write one network's ``<part>.safetensors`` into an existing folder, atomically."""
    temporary = folder / f".{part}.safetensors.{os.getpid()}"
    state = {key: cast(value, dtype) for key, value in lazies(module.state_dict()).items()}
    try:
        write_part(temporary, state, lambda key, tensor: tensor.read())
        os.replace(temporary, folder / f"{part}.safetensors")
    finally:
        temporary.unlink(missing_ok=True)


def write_part(path: Path, state: Lazies, read: Read) -> None:
    """Write the file of one network, whose tensors ``read`` gives."""
    write_safetensors(path, state, read, {"format": FORMAT})


def write_config(folder: Path, config: ModelConfig, usage: Usage | None = None) -> None:
    """Write ``config.json``: the model's sizes and, where it is told, how the model is to be run."""
    content = {"format": FORMAT, "model": to_dict(config)}
    if usage is not None and (section := usage.to_json(layout="native")):
        content[KEY] = section
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2))


def part_of(native: Lazies, part: str) -> Lazies:
    """Return the tensors of one part, whose name is taken off."""
    return {
        key.removeprefix(f"{part}."): value for key, value in native.items() if key.startswith(f"{part}.")
    }


def load_config(folder: str | Path) -> ModelConfig:
    """Read the model's configuration of a native folder."""
    content, path = _read_config(Path(folder)), Path(folder) / CONFIG_NAME
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: it has no 'model' section; copy the model again")
    return from_dict(ModelConfig, content["model"], str(path))


def load_usage(folder: Path) -> Usage:
    """Read how the model of a native folder is to be run; a folder that does not say holds an empty one."""
    return usage_from_json(_read_config(folder).get(KEY), folder / CONFIG_NAME)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"'{folder}' is not a model folder: it has no {CONFIG_NAME}")
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: not a model of this project (its format is not '{FORMAT}')")
    return content


def open_native(folder: Path, config: ModelConfig | None = None) -> Opened:
    """Check the files of a native folder; no weight is read.

    Args:
        folder: written by :func:`save_model`.
        config: sizes; None reads the folder's own.
    """
    sizes = config or load_config(folder)
    native = native_shapes(sizes)
    tensors: Lazies = {}
    for part in PARTS:
        found, expected = _part_file(folder, part), part_of(native, part)
        check_shapes(shapes(found), shapes(expected), str(folder / f"{part}.safetensors"), describe(found))
        tensors |= {f"{part}.{key}": found[key] for key in expected}
    usage = load_usage(folder) if (folder / CONFIG_NAME).is_file() else UNSAID
    return Opened(str(folder), "native", sizes, tensors, usage=usage)


def _part_file(folder: Path, part: str) -> Lazies:
    path = folder / f"{part}.safetensors"
    if not path.is_file():
        raise UserError(f"'{folder}' is not a complete model: {path.name} is missing")
    return open_weights(path).tensors


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LatentDiffusion:
    """Load a native folder, strictly, in evaluation mode.

    Args:
        folder: written by :func:`save_model`.
        device: where the model goes.
        dtype: type of the weights in memory; None means float32.
    """
    return build(open_native(Path(folder)), dtype or torch.float32).to(device)


def load_part(
    folder: Path, part: str, module: nn.Module, *, dtype: torch.dtype = torch.float32, assign: bool = False
) -> None:
    """Load one network of a native folder into ``module``; errors as in :func:`load_model`."""
    found = _part_file(folder, part)
    check_shapes(shapes(found), shapes(lazies(module.state_dict())), str(folder / f"{part}.safetensors"))
    module.load_state_dict({key: cast(value, dtype).read() for key, value in found.items()}, assign=assign)


def check_keys(state: dict[str, Tensor], module: nn.Module, source: str) -> None:
    """Compare a state dict with what ``module`` expects."""
    check_shapes(shapes(lazies(state)), shapes(lazies(module.state_dict())), source)
