"""Which files of a folder hold the weights: one file, or shards with or without an index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TypeVar

from pbe.checkpoints.recognise import Weights
from pbe.checkpoints.weight_files import open_weights
from pbe.errors import UserError

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
CHECKER = "safety_checker"  # the folder of one inside a model's
SHARD = re.compile(r"-\d{5}-of-(\d{5})$")
# Files that lie beside weights under the same suffixes without being the model's.
STRANGERS = (
    *("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scheduler.bin"),
    "rng_state.pth",
)
Name = TypeVar("Name", bound=PurePath)


@dataclass(frozen=True)
class FileChoice:
    """Which of several copies of the same weights are wanted.

    Attributes:
        variant: the word between name and ending (``model.fp16.safetensors``); None prefers files without.
        safetensors: True or False take these or pickles alone; None prefers safetensors.
    """

    variant: str | None = None
    safetensors: bool | None = None

    def narrow(self, paths: Iterable[Name], where: str) -> list[Name]:
        """Return the files that may be taken."""
        listed = list(paths)
        kept = [path for path in listed if self.variant is None or variant_of(path) == self.variant]
        if listed and not kept:
            there = ", ".join(sorted({variant_of(path) or "no variant" for path in listed}))
            raise UserError(f"{where} has no weights of the variant '{self.variant}' (there is: {there})")
        wanted = [path for path in kept if self.safetensors in (None, not is_pickle(path))]
        if kept and not wanted:
            kind = "safetensors" if self.safetensors else "pickles"
            raise UserError(f"{where} holds no {kind}, which use_safetensors={self.safetensors} asks for")
        return wanted


ANY = FileChoice()


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that lie in a folder itself, by name; half-written ones are left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in SUFFIXES and path.name not in STRANGERS and not path.name.startswith(".")
    )


def open_folder(folder: Path, choice: FileChoice = ANY) -> Weights:
    """Open the weights that lie in a folder: shards with an index, shards without one, or one file.

    Where the same weights lie there more than once, safetensors are taken before pickles, and the plain
    file before a variant (``model.fp16.safetensors``), unless the choice says otherwise.
    """
    found = [*folder.glob("*.index.json"), *folder.glob("*.index.*.json"), *weight_files(folder)]
    allowed = choice.narrow(found, f"'{folder}'")
    indices = [path for path in allowed if path.suffix == ".json"]
    files = [path for path in allowed if path not in indices]
    if indices:
        best = min(indices, key=lambda path: (*rank(path), path.name))
        return _open_shards(folder, _index(best), str(best))
    if not files:
        raise UserError(f"'{folder}' is not a model folder: it holds no weights ({', '.join(SUFFIXES)})")
    shards = [path for path in files if SHARD.search(path.stem)]
    if shards:
        return _open_numbered(folder, shards)
    ranked = [path for path in files if rank(path) == min(map(rank, files))]
    if len(ranked) > 1:
        raise UserError(
            f"'{folder}' holds several models ({', '.join(path.name for path in ranked)}); name one of them"
        )
    return open_weights(ranked[0])


def variant_of(path: PurePath) -> str:
    """Return the variant that the name of a file of weights, or of its index, gives; empty without one."""
    words = [SHARD.sub("", word) for word in path.name.removesuffix(".json").split(".")[1:]]
    return ".".join(word for word in words if word != "index" and f".{word}" not in SUFFIXES)


def is_pickle(path: PurePath) -> bool:
    """Return whether a file of weights, or those that an index lists, are pickles."""
    return ".safetensors" not in path.name


def rank(path: PurePath) -> tuple[bool, bool]:
    """Return what the best copy of the same weights has the least of: a variant, being a pickle."""
    return bool(variant_of(path)), is_pickle(path)


def _index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text())["weight_map"]
        return {str(key): str(name) for key, name in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not an index of shards ({error}); copy it again") from error


def _open_shards(folder: Path, index: dict[str, str], source: str) -> Weights:
    files = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"'{folder}': shard '{name}' is missing; copy the model again")
        files[name] = open_weights(folder / name)
    lost = [key for key, name in index.items() if key not in files[name].tensors]
    if lost:
        raise UserError(
            f"{source}: {len(lost)} tensors are not in their shard: {', '.join(lost[:10])}; copy it again"
        )
    return Weights(source, {key: files[name].tensors[key] for key, name in index.items()})


def _open_numbered(folder: Path, shards: list[Path]) -> Weights:
    kinds = {SHARD.sub("", path.stem) + path.suffix for path in shards}
    if len(kinds) > 1 or len(shards) != int(SHARD.findall(shards[0].stem)[0]):
        raise UserError(
            f"'{folder}': the shards {', '.join(path.name for path in shards)} are not one complete model"
        )
    tensors = {key: value for path in shards for key, value in open_weights(path).tensors.items()}
    return Weights(str(folder), tensors)
