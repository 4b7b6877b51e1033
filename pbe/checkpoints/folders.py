"""Which files of a folder hold the weights: one file, or shards with or without an index."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pbe.checkpoints.archives import Weights, open_weights
from pbe.errors import UserError

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
SHARD = re.compile(r"-\d{5}-of-(\d{5})$")
# Files that lie beside weights under the same suffixes without being the model's.
STRANGERS = (
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scheduler.bin",
    "rng_state.pth",
)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that lie in a folder itself, by name; half-written ones are left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in SUFFIXES and path.name not in STRANGERS and not path.name.startswith(".")
    )


def open_folder(folder: Path) -> Weights:
    """Open the weights that lie in a folder: shards with an index, shards without one, or one file.

    Where the same weights lie there more than once, safetensors are taken before pickles, and the plain
    file before a variant (``model.fp16.safetensors``).

    Raises:
        UserError: no weights, several models, or as :func:`pbe.checkpoints.archives.open_weights`.
    """
    indices = sorted(
        folder.glob("*.index.json"), key=lambda path: (_variant(path), _is_pickle(path), path.name)
    )
    if indices:
        return _open_shards(folder, _index(indices[0]), str(indices[0]))
    files = weight_files(folder)
    if not files:
        raise UserError(f"'{folder}' is not a model folder: it holds no weights ({', '.join(SUFFIXES)})")
    shards = [path for path in files if SHARD.search(path.stem)]
    if shards:
        return _open_numbered(folder, shards)
    ranked = sorted(files, key=lambda path: (_variant(path), _is_pickle(path)))
    best = [
        path
        for path in ranked
        if (_variant(path), _is_pickle(path)) == (_variant(ranked[0]), _is_pickle(ranked[0]))
    ]
    if len(best) > 1:
        raise UserError(
            f"'{folder}' holds several models ({', '.join(path.name for path in best)}); name one of them"
        )
    return open_weights(best[0])


def _variant(path: Path) -> bool:
    names = path.name.removesuffix(".index.json").split(".")
    return len(names) > 2


def _is_pickle(path: Path) -> bool:
    return ".safetensors" not in path.name


def _index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text())["weight_map"]
        return {str(key): str(name) for key, name in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an index of shards ({error}); copy it again") from error


def _open_shards(folder: Path, index: dict[str, str], source: str) -> Weights:
    files = {name: open_weights(_inside(folder, name)) for name in sorted(set(index.values()))}
    lost = [key for key, name in index.items() if key not in files[name].tensors]
    if lost:
        raise UserError(
            f"{source}: {len(lost)} tensors are not in their shard: {', '.join(lost[:10])}; copy it again"
        )
    return Weights(source, {key: files[name].tensors[key] for key, name in index.items()})


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise UserError(f"'{folder}': shard '{name}' is missing; copy the model again")
    return path


def _open_numbered(folder: Path, shards: list[Path]) -> Weights:
    kinds = {SHARD.sub("", path.stem) + path.suffix for path in shards}
    match = SHARD.search(shards[0].stem)
    assert match is not None
    if len(kinds) > 1 or len(shards) != int(match[1]):
        raise UserError(
            f"'{folder}': the shards {', '.join(path.name for path in shards)} are not one complete model"
        )
    tensors = {key: value for path in shards for key, value in open_weights(path).tensors.items()}
    return Weights(str(folder), tensors)
