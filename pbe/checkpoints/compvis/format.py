"""Checkpoints of the original: one state dict with everything in it, and a YAML beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pbe.checkpoints.averages import Sorted, choose, left_out
from pbe.checkpoints.clip import POSITION_IDS
from pbe.checkpoints.compvis.buffers import BUFFERS, check_schedule, derived
from pbe.checkpoints.compvis.config import is_original_yaml, read_config, read_yaml
from pbe.checkpoints.compvis.names import AUTOENCODER, CONDITION, TOWER, UNET, entries
from pbe.checkpoints.contents import Weights
from pbe.checkpoints.layout import native_shapes, to_foreign, to_native
from pbe.checkpoints.opened import Opened
from pbe.checkpoints.recognise import TEXT, describe
from pbe.checkpoints.strict import check_shapes, shapes
from pbe.checkpoints.tensors import Lazies
from pbe.checkpoints.usage import KEY, Usage, usage_from_json
from pbe.config import ModelConfig, load_config
from pbe.errors import UserError

LESSER_BUFFERS = ("lvlb_weights", "logvar", "scale_factor")
PARTS = {UNET: "UNet", AUTOENCODER: "autoencoder", CONDITION: "exemplar encoder"}
# Left out without loss: what follows from the configuration, and the loss's own network.
DROPPED = (
    ("schedule buffers", re.compile(rf"(?:.*\.)?(?:{'|'.join((*BUFFERS, *LESSER_BUFFERS))})")),
    ("position indices", re.compile(rf"{re.escape(CONDITION)}.*{re.escape(POSITION_IDS)}")),
    ("weights of the training loss", re.compile(r"first_stage_model\.loss\..*")),
)


def clean(found: Sorted) -> tuple[Sorted, list[str]]:
    """Leave out what is no weight and bring the tower's names to those of 2022; returns what was left out."""
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


def resolve_config(
    given: ModelConfig | str | Path | None, path: Path, tensors: Lazies
) -> tuple[ModelConfig, bool]:
    """Return the sizes of a model without any of its own, and whether they were assumed.

    Args:
        given: a configuration, a YAML of this project or of the original, or None: the YAML beside the
            weights, and the official sizes without one.
        path: the file or folder of weights.
        tensors: its state dict, cleaned.
    """
    if isinstance(given, ModelConfig):
        return given, False
    source = Path(given) if given is not None else yaml_beside(path)
    if source is None:
        return ModelConfig(), True
    content: Any = read_yaml(source)
    if not is_original_yaml(content):
        return load_config(source).model, False
    if not any(key.startswith(TOWER) for key in tensors):
        raise UserError(f"{path}: no image tower in it. {describe(tensors)}")
    return read_config(content, str(source), tensors), False


def open_compvis(
    path: Path,
    weights: Weights,
    found: Sorted,
    config: ModelConfig | str | Path | None,
    *,
    raw_weights: bool = False,
) -> Opened:
    """Translate an original checkpoint.

    Args:
        path: the file or folder of weights.
        weights: what it holds.
        found: its state dict, sorted.
        config: as :func:`resolve_config` takes it.
        raw_weights: take the plain weights where there are averaged ones.
    """
    whole = found.plain | found.strangers
    found, notes = clean(found)
    sizes, assumed = resolve_config(config, path, found.plain)
    names = entries(sizes, list(native := native_shapes(sizes)))
    expected = shapes(to_foreign(names, native))
    tensors, said = choose(found, expected, weights.source, raw_weights=raw_weights)
    check_shapes(shapes(tensors), expected, weights.source, _hint(path, whole, assumed), PARTS)
    check_schedule(whole, sizes.schedule, weights.source)
    if weights.extra:
        notes.append(f"{', '.join(weights.extra)} ({weights.extra_bytes / 1e6:,.1f} MB, not read)")
    if assumed:
        notes.append("no configuration beside it: taken for the official sizes")
    notes = [*said, *weights.notes, *notes]
    native_tensors, usage = to_native(names, tensors), _usage(config, path)
    return Opened(weights.source, "compvis", sizes, native_tensors, tuple(notes), usage)


def _usage(given: ModelConfig | str | Path | None, path: Path) -> Usage:
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
    """Return what an original checkpoint holds beside them: schedule buffers and position indices."""
    return derived(config.schedule, native["exemplar_encoder.tower.positional_embedding"].shape[0])
