"""Models from files: any layout, recognised by what is inside, checked strictly, read lazily."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pbe.checkpoints.adapters import ADAPTER_NAME
from pbe.checkpoints.compvis.format import (
    ConfigSource,
    is_original_yaml,
    open_compvis,
    read_yaml,
    resolve_config,
)
from pbe.checkpoints.diffusers.format import find_parts, open_diffusers
from pbe.checkpoints.folders import ANY, CHECKER, FileChoice, open_folder, weight_files
from pbe.checkpoints.key_map import PARTS, OpenedModel, check_shapes, native_shapes
from pbe.checkpoints.native import CONFIG_NAME, FORMAT, open_native
from pbe.checkpoints.recognise import (
    COMPVIS,
    NATIVE,
    Weights,
    choose,
    describe,
    layout_of,
    left_out,
    sort_out,
)
from pbe.checkpoints.settings import UNSAID, Usage, reading, usage_for
from pbe.checkpoints.weight_files import open_weights
from pbe.config import ModelConfig, flatten, from_dict, to_dict
from pbe.errors import UserError
from pbe.models import LatentDiffusion

PART_NAMES = {f"{part}.": part.replace("_", " ") for part in PARTS}
CHECKPOINTS, LAST, MODEL = "checkpoints", "last.ckpt", "model"  # names in a run's folder
MINUTE = 60.0  # seconds; files of one run that was copied differ by less
OPEN = {f"exemplar_encoder.{name}" for name in ("mean", "std", "image_size")}  # empty: the tower's own
SHOWN = 3  # settings that a note lists


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
    config: ConfigSource = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    files: FileChoice = ANY,
    raw_weights: bool = False,
    int8: bool = False,
) -> Loaded:
    """Load a model of any layout, strictly; where it is not one, the error says what it looks like.

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
        int8: hold the weights of UNet and exemplar encoder in 8 bits; ``dtype`` is then what they compute in.
    """
    opened = open_checkpoint(path, config, files, raw_weights=raw_weights)
    model = opened.read(dtype or torch.float32, int8=int8).to(device)
    return Loaded(model, opened.layout, opened.usage, opened.safety_checker, opened.notes)


def open_checkpoint(
    path: str | Path, config: ConfigSource = None, files: FileChoice = ANY, *, raw_weights: bool = False
) -> OpenedModel:
    """Recognise a model of any layout and check its keys and shapes; no weight is read.

    Arguments and errors are those of :func:`load_checkpoint`, but for the finiteness of the weights.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"'{path}' does not exist; give a model folder or a checkpoint")
    place, notes = of_run(path, raw_weights=raw_weights) if path.is_dir() else (path, [])
    opened = _open(place, config, files, raw_weights)
    checker = opened.safety_checker
    if opened.layout != "diffusers" and (place / CHECKER).is_dir():  # those of diffusers are told by content
        checker = place / CHECKER
    usage = usage_for(opened.config, opened.usage)
    notes = [*notes, *opened.notes]
    return replace(opened, tensors=opened.numbers(), notes=tuple(notes), safety_checker=checker, usage=usage)


def of_run(folder: Path, *, raw_weights: bool) -> tuple[Path, list[str]]:
    """Return what a run's folder stands for: its model, or its newest checkpoint where there is none.

    The ``checkpoints`` folder of a run does too; any other stands for itself. Raw weights are in checkpoints.
    """
    newest = _newest(folder / CHECKPOINTS) or _newest(folder)
    model = folder / MODEL / CONFIG_NAME
    if model.is_file() and not raw_weights:
        notes = [f"a run: its {MODEL}/ is taken"]
        if newest is not None and newest.stat().st_mtime > model.stat().st_mtime + MINUTE:
            notes.append(f"{newest} was written after it; name that file to take it")
        return folder / MODEL, notes
    if (folder / ADAPTER_NAME).is_file():
        raise UserError(
            f"'{folder}' is a run that trained adapters: load the model that they belong to, and this folder "
            "as its adapter (--adapter)"
        )
    if newest is not None:
        return newest, [f"a run: its {newest.relative_to(folder)} is taken"]
    return folder, []


def _newest(folder: Path) -> Path | None:
    """Return the checkpoint that a run wrote last, or None."""
    if (folder / LAST).is_file():
        return folder / LAST
    return max(folder.glob("step=*.ckpt"), key=lambda path: path.name, default=None)


def _open(path: Path, config: ConfigSource, files: FileChoice, raw_weights: bool) -> OpenedModel:
    if not path.is_dir():
        files.narrow([path], f"'{path}'")
        return _open_state(path, open_weights(path), config, raw_weights)
    native, parts = _is_native(path), find_parts(path)
    finished = native or bool(parts.keys() - {CHECKER})  # a checker alone may lie beside any model
    if finished and raw_weights:
        raise UserError(
            f"'{path}' holds one set of weights only; --raw-weights is for a training's checkpoints and runs"
        )
    if native:
        files.narrow(weight_files(path), f"'{path}'")
        return open_native(path, _sizes_beside(config, path))
    if finished:
        return open_diffusers(path, parts, _sizes_beside(config, path), files)
    if (path / "model_index.json").is_file():
        raise UserError(
            f"'{path}' is not a complete model: it has a model_index.json, but no network; copy it again"
        )
    return _open_state(path, open_folder(path, files), config, raw_weights)


def _sizes_beside(config: ConfigSource, path: Path) -> ModelConfig | None:
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


def _open_state(path: Path, weights: Weights, config: ConfigSource, raw_weights: bool) -> OpenedModel:
    """Open the state dict of a whole model."""
    found = sort_out(weights)
    config = _carried_config(weights) if config is None else config
    layout = layout_of(found)
    if layout == COMPVIS:
        return open_compvis(path, weights, found, config, raw_weights=raw_weights)
    whole = found.plain | found.strangers
    if layout is None:
        raise UserError(f"{weights.source} is not a whole model. {describe(whole)}")
    sizes, assumed = resolve_config(config, path, found.plain)
    expected = native_shapes(sizes)
    tensors, notes = choose(found, expected, weights.source, raw_weights=raw_weights)
    check_shapes(tensors, expected, weights.source, describe(whole), PART_NAMES)
    notes += [*weights.notes, *_training_notes(weights, sizes), *left_out(found.strangers), *assumed]
    return OpenedModel(weights.source, NATIVE, sizes, {key: tensors[key] for key in expected}, tuple(notes))


def _carried_config(weights: Weights) -> ModelConfig | None:
    """Return the sizes that a training checkpoint of this project carries, None for any other file."""
    if weights.config is None:
        return None
    source = f"{weights.source}: the configuration in it"
    with reading(source):  # a crafted or damaged pickle may hold anything there
        return from_dict(ModelConfig, weights.config["model"], source)


def _training_notes(weights: Weights, given: ModelConfig) -> list[str]:
    """Return what to say of a training checkpoint's task, and of sizes that are not those it carries."""
    if weights.config is None:
        return []
    notes = []
    if weights.config.get("task") == "autoencoder":
        notes.append("of an autoencoder's training: its UNet is untrained, its scale factor not yet measured")
    with reading(weights.source):
        stored, used = flatten(weights.config["model"]), flatten(to_dict(given))
    both = [key for key in used if key in stored and (stored[key] or key not in OPEN)]
    differing = [f"{key} {stored[key]} -> {used[key]}" for key in both if stored[key] != used[key]]
    if differing:
        listed = "; ".join(differing[:SHOWN])
        notes.append(f"the configuration given is used, which is not the one it carries: {listed}")
    return notes
