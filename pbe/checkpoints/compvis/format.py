"""Checkpoints of the original: one state dict with everything in it, and a YAML beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from pbe.checkpoints.clip import POSITION_IDS
from pbe.checkpoints.compvis.config import is_original_yaml, read_config, read_yaml, write_config
from pbe.checkpoints.compvis.names import AUTOENCODER, CONDITION, TOWER, UNET, entries
from pbe.checkpoints.key_map import OpenedModel, converted, native_shapes, to_foreign, to_native
from pbe.checkpoints.readers import Weights
from pbe.checkpoints.recognise import TEXT, Sorted, choose, describe, left_out
from pbe.checkpoints.settings import KEY, Usage, usage_from_json
from pbe.checkpoints.tensors import Lazies, lazies
from pbe.checkpoints.writers import write_checkpoint, write_safetensors
from pbe.config import ModelConfig, ScheduleConfig, load_config
from pbe.errors import UserError

ConfigSource = ModelConfig | str | Path | None
PARTS = {UNET: "UNet", AUTOENCODER: "autoencoder", CONDITION: "exemplar encoder"}


def schedule_buffers(schedule: ScheduleConfig) -> dict[str, Tensor]:
    """Return the twelve vectors of an original checkpoint that follow from its schedule, float32.

    Computed in float64 in the original's order of operations, so that they come out the same to the bit.
    """
    start, end = schedule.beta_start**0.5, schedule.beta_end**0.5
    betas = torch.linspace(start, end, schedule.timesteps, dtype=torch.float64).square().numpy()
    alphas = 1.0 - betas
    product = np.cumprod(alphas, axis=0)
    previous = np.append(1.0, product[:-1])
    variance = betas * (1.0 - previous) / (1.0 - product)
    buffers = {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(product),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - product),
        "log_one_minus_alphas_cumprod": np.log(1.0 - product),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / product),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / product - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - product),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(alphas) / (1.0 - product),
    }
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in buffers.items()}


BUFFERS = (*schedule_buffers(ScheduleConfig(timesteps=2)), "lvlb_weights", "logvar", "scale_factor")
# Left out without loss: what follows from the configuration, and the loss's own network.
DROPPED = (
    ("schedule buffers", re.compile(rf"(?:.*\.)?(?:{'|'.join(BUFFERS)})")),
    ("position indices", re.compile(rf"{re.escape(CONDITION)}.*{re.escape(POSITION_IDS)}")),
    ("weights of the training loss", re.compile(r"first_stage_model\.loss\..*")),
)


def clean(found: Sorted) -> tuple[Sorted, list[str]]:
    """Leave out what is not a weight, which the notes say, and bring the tower's names to those of 2022."""
    kept: Lazies = {}
    strangers: Lazies = {}
    counts: dict[str, int] = {}
    for table, names in ((kept, found.plain), (strangers, found.strangers)):
        for key, tensor in names.items():
            reason = next((reason for reason, pattern in DROPPED if pattern.fullmatch(key)), None)
            if reason is None:
                table[_tower_of_2022(key)] = tensor
            else:
                counts[reason] = counts.get(reason, 0) + 1
    notes = [f"{count} {reason}" for reason, count in counts.items()]
    return Sorted(kept, found.average, strangers), [*notes, *left_out(strangers)]


def _tower_of_2022(key: str) -> str:
    """Put the level back that transformers 5 leaves out of a tower's names."""
    inner = key.removeprefix(f"{CONDITION}transformer.")
    moved = inner != key and inner.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."))
    return TOWER + inner if moved else key


def yaml_beside(path: Path) -> Path | None:
    """Return the YAML of a checkpoint: the only one of its folder, one with the file's stem, or its run's."""
    if path.is_dir():
        found = [*path.glob("*.yaml"), *path.glob("*.yml")]
        return found[0] if len(found) == 1 else None
    places = [path.with_suffix(".yaml"), path.with_suffix(".yml")]
    if path.parent.name == "checkpoints":
        places.append(path.parent.parent / "config.yaml")
    return next((place for place in places if place.is_file()), None)


def resolve_config(given: ConfigSource, path: Path, tensors: Lazies) -> tuple[ModelConfig, list[str]]:
    """Return the sizes of a model without any of its own, and a note where they were assumed.

    Args:
        given: a configuration, a YAML of this project or of the original, or None: the YAML beside the
            weights, and the official sizes without one.
        path: the file or folder of weights.
        tensors: its state dict, cleaned.
    """
    if isinstance(given, ModelConfig):
        return given, []
    source = Path(given) if given is not None else yaml_beside(path)
    if source is None:
        return ModelConfig(), ["no configuration beside it: taken for the official sizes"]
    content = read_yaml(source)
    if not is_original_yaml(content):
        return load_config(source).model, []
    if not any(key.startswith(TOWER) for key in tensors):
        raise UserError(f"{path}: no image tower in it. {describe(tensors)}")
    return read_config(content, str(source), tensors), []


def open_compvis(
    path: Path, weights: Weights, found: Sorted, config: ConfigSource, *, raw_weights: bool = False
) -> OpenedModel:
    """Translate an original checkpoint; ``found`` is its state dict, ``config`` as for resolve_config."""
    whole = found.plain | found.strangers
    found, dropped = clean(found)
    sizes, assumed = resolve_config(config, path, found.plain)
    names = entries(sizes, list(native := native_shapes(sizes)))
    expected = [key for entry in names for key in entry.foreign]
    tensors, said = choose(found, expected, weights.source, raw_weights=raw_weights)
    hint = _hint(path, whole, bool(assumed))
    native_tensors = to_native(names, tensors, native, weights.source, hint, PARTS)
    _check_schedule(whole, sizes.schedule, weights.source)
    if weights.extra:
        dropped.append(f"{', '.join(weights.extra)} ({weights.extra_bytes / 1e6:,.1f} MB, not read)")
    notes = (*said, *weights.notes, *dropped, *assumed)
    return OpenedModel(weights.source, "compvis", sizes, native_tensors, notes, _usage(config, path))


def _check_schedule(tensors: Lazies, schedule: ScheduleConfig, source: str) -> None:
    """Compare the betas in a checkpoint, where it has them, with the configuration's, to half precision."""
    given = next((tensor for key, tensor in tensors.items() if key.rpartition(".")[2] == "betas"), None)
    if given is None:
        return
    found, wanted = given.read().float().flatten(), schedule_buffers(schedule)["betas"]
    first, last = (found[place].sum() for place in (slice(1), slice(-1, None)))
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=5e-3, atol=0.0):
        raise UserError(
            f"{source}: trained with another noise schedule ({len(found)} timesteps, betas {first:.6g} to "
            f"{last:.6g}) than the configuration says; give the one it was trained with"
        )


def _usage(given: ConfigSource, path: Path) -> Usage:
    """Read what the YAML of a checkpoint says of how the model is to be run."""
    source = Path(given) if isinstance(given, str | Path) else yaml_beside(path)
    content: Any = None if source is None else read_yaml(source)
    return usage_from_json(content.get(KEY) if is_original_yaml(content) else None, str(source))


def _hint(path: Path, tensors: Lazies, assumed: bool) -> str:
    hint = describe(tensors)
    if not assumed or any(key.startswith(TEXT) for key in tensors):
        return hint
    folder = path if path.is_dir() else path.parent
    beside = ", ".join(sorted(p.name for p in folder.glob("*.y*ml")))
    return (
        f"{hint} The official sizes were assumed; give its own as config{f' ({beside}?)' if beside else ''}"
    )


def original_weights(config: ModelConfig, native: Lazies) -> Lazies:
    """Return the weights under the original's names."""
    return to_foreign(entries(config, list(native)), native)


def derived_buffers(config: ModelConfig, native: Lazies) -> Lazies:
    """Return what an original checkpoint holds beside the weights: schedule buffers and position indices."""
    positions = native["exemplar_encoder.tower.positional_embedding"].shape[0]
    indices = {TOWER + POSITION_IDS: torch.arange(positions)[None]}
    return lazies(schedule_buffers(config.schedule) | indices)


def write_original(
    path: Path, yaml: Path, config: ModelConfig, native: Lazies, dtype: torch.dtype | None, usage: Usage
) -> None:
    """Write one file in the original's layout, and its YAML, which also says how the model is to be run.

    The file is of safetensors if it is called so, else a checkpoint of torch; the schedule in it is float32
    whatever ``dtype``. The original's code does not read the section that the YAML has in addition.
    """
    weights, buffers = original_weights(config, native), derived_buffers(config, native)
    stored = converted(weights, dtype) | converted(buffers, None)
    if path.suffix == ".safetensors":
        write_safetensors(path, stored, {"format": "pt"})
    else:
        write_checkpoint(path, stored, {"global_step": 0, "epoch": 0})
    OmegaConf.save(OmegaConf.create(write_config(config) | usage.section("compvis")), yaml)
