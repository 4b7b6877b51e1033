"""The project's own layout: a folder with the model's configuration and one safetensors file a network."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pbe.config import ModelConfig, from_dict, to_dict
from pbe.errors import UserError
from pbe.files import make_folder
from pbe.models import ExemplarEncoder, LatentDiffusion

PARTS = ("unet", "autoencoder", "exemplar_encoder")
CONFIG_NAME = "config.json"
FORMAT = "pbe-native-1"
LISTED = 10


def save_model(folder: str | Path, model: LatentDiffusion, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and ``{unet,autoencoder,exemplar_encoder}.safetensors``.

    Everything is written beside the folder's files first and takes their place at the end, so that a
    failure on the way leaves an older model as it was.

    Args:
        folder: made when missing.
        model: the weights.
        dtype: type of the floating-point tensors in the files; None keeps each tensor's own.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    folder = make_folder(folder)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        for part in PARTS:
            save_part(Path(staging), part, getattr(model, part), dtype)
        content = json.dumps({"format": FORMAT, "model": to_dict(model.config)}, indent=2)
        (Path(staging) / CONFIG_NAME).write_text(content)
        for name in (*(f"{part}.safetensors" for part in PARTS), CONFIG_NAME):
            os.replace(Path(staging) / name, folder / name)


def save_part(folder: Path, part: str, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write one network's ``<part>.safetensors`` into an existing folder, atomically."""
    state = {key: _cast(value, dtype) for key, value in module.state_dict().items()}
    temporary = folder / f".{part}.safetensors.{os.getpid()}"
    try:
        save_file(state, temporary, metadata={"format": FORMAT})
        os.replace(temporary, folder / f"{part}.safetensors")
    finally:
        temporary.unlink(missing_ok=True)


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.detach().cpu()
    return (value.to(dtype) if dtype is not None and value.is_floating_point() else value).contiguous()


def load_config(folder: str | Path) -> ModelConfig:
    """Read the model's configuration of a native folder.

    Raises:
        UserError: no such folder, no or broken ``config.json``, or another format.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"'{folder}' is not a model folder: it has no {CONFIG_NAME}")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the model again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a model of this project (its format is not '{FORMAT}')")
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: it has no 'model' section; copy the model again")
    return from_dict(ModelConfig, content["model"], str(path))


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LatentDiffusion:
    """Load a native folder, strictly, in evaluation mode.

    Args:
        folder: written by :func:`save_model`.
        device: where the model goes.
        dtype: type of the weights in memory; None means float32.

    Raises:
        UserError: missing or damaged file; missing, extra or misshapen keys (the first ten are listed).
    """
    folder, config = Path(folder), load_config(folder)
    with torch.device("meta"):
        model = LatentDiffusion(config)
    if dict(model.named_buffers()).keys() - model.state_dict().keys():
        # such a tower computes buffers that no file holds (position tables), so it has to be built for real
        model.exemplar_encoder = ExemplarEncoder(config.exemplar_encoder, config.unet.context_dim)
    for part in PARTS:
        load_part(folder, part, getattr(model, part), dtype=dtype or torch.float32, assign=True)
    return model.to(device).eval().requires_grad_(False)


def load_part(
    folder: Path, part: str, module: nn.Module, *, dtype: torch.dtype = torch.float32, assign: bool = False
) -> None:
    """Load one network of a native folder into ``module``; errors as in :func:`load_model`."""
    path = folder / f"{part}.safetensors"
    if not path.is_file():
        raise UserError(f"'{folder}' is not a complete model: {path.name} is missing")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}); copy it again") from error
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    check_keys(state, module, str(path))
    module.load_state_dict(state, assign=assign)


def check_keys(state: dict[str, Tensor], module: nn.Module, source: str) -> None:
    """Compare a state dict with what ``module`` expects.

    Raises:
        UserError: lists missing, extra and misshapen keys, the first ten of each and their number.
    """
    expected = module.state_dict()
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "misshapen": sorted(k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape),
    }
    lines = [
        f"{len(keys)} {kind}: {', '.join(keys[:LISTED])}{', ...' if len(keys) > LISTED else ''}"
        for kind, keys in problems.items()
        if keys
    ]
    if lines:
        raise UserError(f"{source} does not fit the model: {'; '.join(lines)}")
