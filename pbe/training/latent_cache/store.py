"""Stores of a latent cache: one for each set of settings, side by side in the cache's folder.

A store ``<first 12 digits of the fingerprint>/`` is a set of shards (:mod:`pbe.data.shards.format`), each of
consecutive samples of one variant, ``STREAM-VARIANT-NUMBER.tar``. Its ``shards.json`` says what the settings
are, how the rows are laid out, and which shards are there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pbe.config import Config
from pbe.data.shards.format import (
    MANIFEST_NAME,
    DamagedIndexError,
    index_entry,
    index_path,
    load_manifest,
    manifest_errors,
    read_index,
)
from pbe.errors import UserError
from pbe.files import atomic_write, make_folder
from pbe.training.latent_cache.record import Layout, from_json, to_json
from pbe.training.latent_cache.settings import Settings, fingerprint

FORMAT, VERSION = "pbe-latents", 1
NAME_DIGITS = 12
SHARD_BYTES = 64 * 2**20
OLD_NAMES = ("train", "validation", ".train.partial", ".validation.partial")


@dataclass(frozen=True)
class LatentShard:
    """Consecutive samples of one variant.

    Attributes:
        stream: ``train`` or ``validation``.
        variant: epoch of the stream.
        number: of the shard in its variant.
        first: position of its first sample in the epoch.
        rows: number of samples.
    """

    stream: str
    variant: int
    number: int
    first: int
    rows: int

    @property
    def name(self) -> str:
        """Name of the tar."""
        return f"{self.stream}-{self.variant:03d}-{self.number:06d}.tar"


def variants_of(config: Config) -> dict[str, int]:
    """Return the variants that a configuration asks for, by stream; validation has one."""
    streams = {"train": config.cache.variants}
    return streams | ({"validation": 1} if config.data.validation_shards else {})


@dataclass(frozen=True)
class LatentStore:
    """What ``shards.json`` of a store says.

    Attributes:
        folder: of the store.
        settings: that it was made with.
        record: type of a row.
        rows: samples of a shard; the last one of a variant has what is left.
        samples: samples of an epoch, by stream.
        listed: the entries of the finished shards in ``shards.json``.
    """

    folder: Path
    settings: Settings
    record: np.dtype[Any]
    rows: int
    samples: dict[str, int]
    listed: tuple[dict[str, Any], ...] = ()

    @property
    def layout(self) -> Layout:
        """Where rows lie in the shards."""
        return Layout(self.record)

    def plan(self, variants: dict[str, int]) -> Iterator[LatentShard]:
        """Yield the shards that so many variants of each stream are made of, in order."""
        for stream, count in variants.items():
            length = self.samples[stream]
            for variant in range(count):
                for number, first in enumerate(range(0, length, self.rows)):
                    yield LatentShard(stream, variant, number, first, min(self.rows, length - first))

    def missing(self, variants: dict[str, int]) -> list[LatentShard]:
        """Return the shards of a plan that are still to be made; UserError where one was cut short."""
        present = {path.name: path.stat().st_size for path in self.folder.glob("*.tar")}
        layout, missing = self.layout, []
        for shard in self.plan(variants):
            if shard.name not in present:
                missing.append(shard)
            elif present[shard.name] != layout.tar_size(shard.rows):
                raise UserError(f"'{self.folder / shard.name}' is damaged; delete it to have it built again")
        return missing

    def is_ready(self, variants: dict[str, int]) -> bool:
        """Say whether all shards of so many variants are listed and there."""
        if set(variants) - set(self.samples):
            return False
        names = {entry["name"] for entry in self.listed}
        return all(shard.name in names for shard in self.plan(variants)) and not self.missing(variants)

    def variants(self) -> dict[str, int]:
        """Return the number of whole variants that are listed, by stream."""
        names, found = {entry["name"] for entry in self.listed}, {}
        for stream, length in self.samples.items():
            numbers, count = range(-(-length // self.rows)), 0
            while numbers and all(LatentShard(stream, count, n, 0, 0).name in names for n in numbers):
                count += 1
            found[stream] = count
        return found

    def write(self) -> LatentStore:
        """Write ``shards.json`` and return the store."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": fingerprint(self.settings),
            "settings": self.settings,
            "record": to_json(self.record),
            "rows": self.rows,
            "first_row": self.layout.start,
            "stride": self.layout.stride,
            "samples": self.samples,
            "shards": list(self.listed),
        }
        text = json.dumps(content, indent=1, sort_keys=True)
        atomic_write(make_folder(self.folder) / MANIFEST_NAME, text, sync=True)
        return self

    def with_finished(self, variants: dict[str, int]) -> LatentStore:
        """Return the store with all shards of a plan listed that are there; their indexes are read."""
        known = {entry["name"]: entry for entry in self.listed}
        for shard in self.plan(variants):
            if shard.name not in known and (self.folder / shard.name).exists():
                known[shard.name] = _entry(self.folder / shard.name, shard.rows)
        return replace(self, listed=tuple(known[name] for name in sorted(known)))

    def _listed_of(self, stream: str) -> list[dict[str, Any]]:
        return [entry for entry in self.listed if entry["name"].startswith(f"{stream}-")]

    def rows_listed(self, stream: str) -> int:
        """Return the number of samples in the listed shards of a stream."""
        return sum(entry["rows"] for entry in self._listed_of(stream))

    def counts(self, stream: str) -> Counter[str]:
        """Return what was skipped or adjusted while the listed shards of a stream were made."""
        return sum((Counter(entry["counts"]) for entry in self._listed_of(stream)), Counter())


def _entry(tar: Path, rows: int) -> dict[str, Any]:
    try:
        index = index_path(tar).read_bytes()
        columns = read_index(index, ("tar_size", "tar_hash", "counts"))
        counts = json.loads(columns["counts"].tobytes())
    except (OSError, ValueError, DamagedIndexError) as error:
        raise UserError(
            f"'{index_path(tar)}' is damaged ({error}); delete '{tar}' to have both built again"
        ) from error
    facts = {"name": tar.name, "bytes": int(columns["tar_size"]), "rows": rows, "counts": counts}
    return facts | {"blake2b": columns["tar_hash"].tobytes().hex()} | index_entry(tar, index)


def store_folder(folder: str | Path, settings: Settings) -> Path:
    """Return where the store of some settings lies."""
    return Path(folder) / fingerprint(settings)[:NAME_DIGITS]


def read_store(folder: Path) -> LatentStore | None:
    """Read a store's ``shards.json``; None where there is none."""
    path = folder / MANIFEST_NAME
    remedy = f"delete '{folder}' to have it built again"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"'{path}' is damaged ({error}); {remedy}") from error
    content = load_manifest(text, path, FORMAT, VERSION, remedy)
    with manifest_errors(path, remedy):
        return LatentStore(
            folder=folder,
            settings=dict(content["settings"]),
            record=from_json(content["record"]),
            rows=int(content["rows"]),
            samples={stream: int(count) for stream, count in content["samples"].items()},
            listed=tuple(dict(entry) for entry in content["shards"]),
        )


def refuse_older(folder: Path) -> None:
    """Refuse a cache folder of the layout before shards."""
    for name in OLD_NAMES:
        if (folder / name).is_dir():
            raise UserError(
                f"the latent cache '{folder}' was made by an older version; delete '{folder / name}'"
                " or name another cache.folder"
            )


def stores_in(folder: Path) -> Sequence[Path]:
    """Return the folders of a cache that look like stores, whatever is in them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and len(path.name) == NAME_DIGITS)


def rows_of_shard(config: Config, layout: Layout) -> int:
    """Return how many samples a shard is to have: as configured, else about 64 MiB of whole batches."""
    if config.cache.shard_samples:
        return config.cache.shard_samples
    batch = config.cache.batch_size
    return max(SHARD_BYTES // layout.stride // batch, 1) * batch
