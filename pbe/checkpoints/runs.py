"""What a training run leaves: its model, its checkpoints, and the configuration that they carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pbe.checkpoints.contents import Weights
from pbe.checkpoints.settings import reading
from pbe.config import ModelConfig, from_dict, to_dict

CHECKPOINTS, LAST, MODEL, MODEL_CONFIG = "checkpoints", "last.ckpt", "model", "config.json"
MINUTE = 60.0  # seconds; files of one run that was copied differ by less
OPEN = {f"exemplar_encoder.{name}" for name in ("mean", "std", "image_size")}  # empty: the tower's own
SHOWN = 3  # settings that an error or a note lists


def of_run(folder: Path, *, raw_weights: bool) -> tuple[Path, list[str]]:
    """Return what a run's folder stands for: its model, or its newest checkpoint where there is none.

    Args:
        folder: of a run, its ``checkpoints`` folder, or any other, which stands for itself.
        raw_weights: the plain weights are wanted, which only checkpoints hold.
    """
    newest = _newest(folder / CHECKPOINTS) or _newest(folder)
    model = folder / MODEL / MODEL_CONFIG
    if model.is_file() and not raw_weights:
        notes = [f"a run: its {MODEL}/ is taken"]
        if newest is not None and newest.stat().st_mtime > model.stat().st_mtime + MINUTE:
            notes.append(f"{newest} was written after it; name that file to take it")
        return folder / MODEL, notes
    if newest is not None:
        return newest, [f"a run: its {newest.relative_to(folder)} is taken"]
    return folder, []


def _newest(folder: Path) -> Path | None:
    """Return the checkpoint that a run wrote last, or None."""
    if (folder / LAST).is_file():
        return folder / LAST
    return max(folder.glob("step=*.ckpt"), key=lambda path: path.name, default=None)


def carried_config(weights: Weights) -> ModelConfig | None:
    """Return the sizes that a training checkpoint of this project carries, None for any other file."""
    if weights.config is None:
        return None
    source = f"{weights.source}: the configuration in it"
    with reading(source):  # a crafted or damaged pickle may hold anything there
        return from_dict(ModelConfig, weights.config["model"], source)


def told(weights: Weights, given: ModelConfig) -> list[str]:
    """Return what to say of a training checkpoint's task, and of sizes that are not those it carries."""
    if weights.config is None:
        return []
    notes = []
    if weights.config.get("task") == "autoencoder":
        notes.append("of an autoencoder's training: its UNet is untrained, its scale factor not yet measured")
    with reading(weights.source):
        stored, used = _flat(weights.config["model"]), _flat(to_dict(given))
    both = [key for key in used if key in stored and (stored[key] or key not in OPEN)]
    differing = [f"{key} {stored[key]} -> {used[key]}" for key in both if stored[key] != used[key]]
    if differing:
        listed = "; ".join(differing[:SHOWN])
        notes.append(f"the configuration given is used, which is not the one it carries: {listed}")
    return notes


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
