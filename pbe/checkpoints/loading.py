"""Models from files: any layout, recognised by what is inside, checked strictly, read lazily."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pbe.checkpoints.averages import choose, left_out, sort_out
from pbe.checkpoints.compvis.config import is_original_yaml, read_yaml
from pbe.checkpoints.compvis.format import open_compvis, resolve_config
from pbe.checkpoints.contents import Weights
from pbe.checkpoints.diffusers.format import find_parts, open_diffusers
from pbe.checkpoints.folders import ANY, CHECKER, FileChoice, open_folder, weight_files
from pbe.checkpoints.layout import PARTS, native_shapes
from pbe.checkpoints.native import CONFIG_NAME, FORMAT, open_native
from pbe.checkpoints.opened import Opened, build, numbers
from pbe.checkpoints.readers import open_weights
from pbe.checkpoints.recognise import COMPVIS, NATIVE, describe, layout_of
from pbe.checkpoints.runs import carried_config, of_run, told
from pbe.checkpoints.strict import check_shapes, shapes
from pbe.checkpoints.usage import UNSAID, Usage
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.models import LatentDiffusion

Config = ModelConfig | str | Path | None
PART_NAMES = {f"{part}.": part.replace("_", " ") for part in PARTS}


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
    raw_weights: bool = False,
) -> Loaded:
    """Load a model of any layout, strictly.

    Args:
        path: native folder; folder in diffusers' layout; folder or file with a checkpoint of the original
            (Lightning's or a bare state dict, torch's or safetensors, whole or in shards); folder of a run,
            whose model or newest checkpoint is meant.
        config: sizes, for files that do not give their own: a configuration, or a YAML of this project or
            of the original. None takes what a training checkpoint carries, the YAML beside a checkpoint, or
            the official sizes.
        device: where the model goes.
        dtype: type of the weights in memory; None means float32.
        files: which copies of the weights, where a folder holds several.
        raw_weights: take the plain weights of a training checkpoint instead of the averaged ones.
    """
    opened = open_checkpoint(path, config, files, raw_weights=raw_weights)
    model = build(opened, dtype or torch.float32).to(device)
    return Loaded(model, opened.layout, opened.usage, opened.safety_checker, opened.notes)


def open_checkpoint(
    path: str | Path, config: Config = None, files: FileChoice = ANY, *, raw_weights: bool = False
) -> Opened:
    """Recognise a model of any layout and check its keys and shapes; no weight is read.

    Arguments and errors are those of :func:`load_checkpoint`, but for the finiteness of the weights.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"'{path}' is not a model folder, nor a checkpoint: it does not exist")
    place, notes = of_run(path, raw_weights=raw_weights) if path.is_dir() else (path, [])
    opened = _open(place, config, files, raw_weights)
    checker = opened.safety_checker
    if checker is None and (place / CHECKER).is_dir():
        checker = place / CHECKER
    return replace(opened, tensors=numbers(opened), notes=(*notes, *opened.notes), safety_checker=checker)


def _open(path: Path, config: Config, files: FileChoice, raw_weights: bool) -> Opened:
    if not path.is_dir():
        files.narrow([path], f"'{path}'")
        return _open_state(path, open_weights(path), config, raw_weights)
    native, parts = _is_native(path), find_parts(path)
    finished = native or bool(parts.keys() - {"safety_checker"})  # a checker alone may lie beside any model
    if finished and raw_weights:
        raise UserError(
            f"'{path}' holds one set of weights only; --raw-weights is for a training's checkpoints and runs"
        )
    if native:
        files.narrow(weight_files(path), f"'{path}'")
        return open_native(path, _typed(config, path))
    if finished:
        return open_diffusers(path, parts, _typed(config, path), files)
    if (path / "model_index.json").is_file():
        raise UserError(
            f"'{path}' is not a complete model: it has a model_index.json, but no network; copy it again"
        )
    return _open_state(path, open_folder(path, files), config, raw_weights)


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
    except (OSError, ValueError, RecursionError):
        return (folder / "unet.safetensors").is_file()  # damaged; the loader of such folders says how
    return isinstance(content, dict) and str(content.get("format")).startswith(FORMAT.rpartition("-")[0])


def _open_state(path: Path, weights: Weights, config: Config, raw_weights: bool) -> Opened:
    """Open the state dict of a whole model."""
    found = sort_out(weights)
    config = carried_config(weights) if config is None else config
    layout = layout_of(found)
    if layout == COMPVIS:
        return open_compvis(path, weights, found, config, raw_weights=raw_weights)
    whole = found.plain | found.strangers
    if layout is None:
        raise UserError(f"{weights.source} is not a whole model. {describe(whole)}")
    sizes, assumed = resolve_config(config, path, found.plain)
    expected = native_shapes(sizes)
    tensors, notes = choose(found, expected, weights.source, raw_weights=raw_weights)
    check_shapes(shapes(tensors), shapes(expected), weights.source, describe(whole), PART_NAMES)
    notes += [*weights.notes, *told(weights, sizes), *left_out(found.strangers)]
    if assumed:
        notes.append("no configuration beside it: taken for the official sizes")
    return Opened(weights.source, NATIVE, sizes, {key: tensors[key] for key in expected}, tuple(notes))
