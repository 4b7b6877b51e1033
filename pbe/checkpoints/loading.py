"""Models from files: any layout, recognised by what is inside, checked strictly, read lazily."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from pbe.checkpoints.archives import Weights, open_weights
from pbe.checkpoints.compvis import open_compvis, resolve_config
from pbe.checkpoints.compvis_config import is_original_yaml, read_yaml
from pbe.checkpoints.diffusers import find_parts, open_diffusers
from pbe.checkpoints.folders import ANY, FileChoice, open_folder, weight_files
from pbe.checkpoints.layout import native_shapes
from pbe.checkpoints.native import CONFIG_NAME, FORMAT, open_native
from pbe.checkpoints.opened import Opened, build
from pbe.checkpoints.recognise import COMPVIS, NATIVE, describe, layout_of
from pbe.checkpoints.strict import check_shapes, shapes
from pbe.checkpoints.tensors import Lazies
from pbe.checkpoints.usage import UNSAID, Usage
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.models import LatentDiffusion

Config = ModelConfig | str | Path | None


@dataclass(frozen=True)
class Loaded:
    """A model ready to run and what its files said beside the weights.

    Attributes:
        model: in evaluation mode, without gradients.
        layout: ``native``, ``compvis`` or ``diffusers``.
        usage: what the files say of how the model is to be run.
        safety_checker: the folder of a safety checker inside the model's, else None.
        notes: one line for each thing in the files that was left out or assumed.
    """

    model: LatentDiffusion
    layout: str
    usage: Usage = UNSAID
    safety_checker: Path | None = None
    notes: tuple[str, ...] = ()


def load_checkpoint(
    path: str | Path,
    *,
    config: Config = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    files: FileChoice = ANY,
) -> Loaded:
    """Load a model of any layout, strictly.

    Args:
        path: native folder; folder in diffusers' layout; folder or file with a checkpoint of the original
            (Lightning's or a bare state dict, torch's or safetensors, whole or in shards).
        config: sizes, for files that do not give their own: a configuration, or a YAML of this project or
            of the original. None takes the YAML beside a checkpoint, or the official sizes.
        device: where the model goes.
        dtype: type of the weights in memory; None means float32.
        files: which copies of the weights, where a folder holds several.

    Raises:
        UserError: nothing there, damaged, not such a model (the error says what it looks like), missing,
            unexpected or misshapen keys, or weights that are not finite.
    """
    opened = open_checkpoint(path, config, files)
    model = build(opened, dtype or torch.float32).to(device)
    return Loaded(model, opened.layout, opened.usage, opened.safety_checker, opened.notes)


def open_checkpoint(path: str | Path, config: Config = None, files: FileChoice = ANY) -> Opened:
    """Recognise a model of any layout and check its keys and shapes; no weight is read.

    Arguments and errors are those of :func:`load_checkpoint`, but for the finiteness of the weights.
    """
    path = Path(path)
    if path.is_file():
        files.narrow([path], f"'{path}'")
        return _open_state(path, open_weights(path), config)
    if not path.is_dir():
        raise UserError(f"'{path}' is not a model folder, nor a checkpoint: it does not exist")
    if _is_native(path):
        files.narrow(weight_files(path), f"'{path}'")
        return open_native(path, _typed(config, path))
    parts = find_parts(path)
    if parts.keys() - {"safety_checker"}:  # a checker alone may lie beside any model
        return open_diffusers(path, parts, _typed(config, path), files)
    if (path / "model_index.json").is_file():
        raise UserError(
            f"'{path}' is not a complete model: it has a model_index.json, but no network; copy it again"
        )
    return _open_state(path, open_folder(path, files), config)


def _typed(config: Config, path: Path) -> ModelConfig | None:
    """Return the sizes given for a folder that has its own, which they have to equal."""
    if config is None or isinstance(config, ModelConfig):
        return config
    if is_original_yaml(read_yaml(Path(config))):
        raise UserError(
            f"'{path}' has a configuration of its own; one of the original's is for checkpoints only"
        )
    return resolve_config(config, path, {})[0]


def _is_native(folder: Path) -> bool:
    try:
        content = json.loads((folder / CONFIG_NAME).read_text())
    except (OSError, ValueError):
        return (folder / "unet.safetensors").is_file()  # damaged; the loader of such folders says how
    return isinstance(content, dict) and str(content.get("format")).startswith(FORMAT.rpartition("-")[0])


def _open_state(path: Path, weights: Weights, config: Config) -> Opened:
    """Open the state dict of a whole model."""
    tensors = _without_wrapper(weights.tensors)
    layout = layout_of(tensors)
    if layout == COMPVIS:
        return open_compvis(path, weights, config)
    if layout is None:
        raise UserError(f"{weights.source} is not a whole model. {describe(tensors)}")
    sizes, assumed = resolve_config(config, path, tensors)
    expected = native_shapes(sizes)
    check_shapes(shapes(tensors), shapes(expected), weights.source, describe(tensors))
    notes = ("no configuration beside it: taken for the official sizes",) if assumed else ()
    return Opened(weights.source, NATIVE, sizes, {key: tensors[key] for key in expected}, notes)


def _without_wrapper(tensors: Lazies) -> Lazies:
    """Take off the name of the attribute that holds the model in a training task's state dict."""
    if not any(key.startswith("model.unet.") for key in tensors):
        return tensors
    return {re.sub(r"^model\.", "", key): value for key, value in tensors.items() if key.startswith("model.")}
