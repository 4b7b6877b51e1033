"""Sections of a latent cache: one for each set of settings, side by side in the cache's folder.

A section ``<first 12 digits of the fingerprint>/`` holds shards of consecutive samples of one variant,
``STREAM-VARIANT-NUMBER.tar``, an ``.index.npz`` beside each, and ``shards.json``, which says what the
settings are, how the rows are laid out, and which shards are there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pbe.config import Config
from pbe.data.packing.records import write_whole
from pbe.errors import UserError
from pbe.files import make_folder
from pbe.training.latent_cache.record import Layout, digest, from_json, to_json
from pbe.training.latent_cache.settings import Settings, fingerprint

MANIFEST_NAME = "shards.json"
FORMAT, VERSION = "pbe-latents", 1
NAME_DIGITS = 12
SHARD_BYTES = 64 * 2**20
OLD_NAMES = ("train", "validation", ".train.partial", ".validation.partial")


@dataclass(frozen=True)
class Shard:
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

    @property
    def index_name(self) -> str:
        """Name of the index."""
        return self.name.removesuffix(".tar") + ".index.npz"


def variants_of(config: Config) -> dict[str, int]:
    """Return the variants that a configuration asks for, by stream; validation has one."""
    streams = {"train": config.cache.variants}
    return streams | ({"validation": 1} if config.data.validation_shards else {})


@dataclass(frozen=True)
class Section:
    """What ``shards.json`` of a section says.

    Attributes:
        folder: of the section.
        settings: that it was made with.
        record: type of a row.
        rows: samples of a shard; the last one of a variant has what is left.
        samples: samples of an epoch, by stream.
        shards: the finished shards that are listed: bytes of each, by name.
        listed: the entries of ``shards.json`` as they stand there.
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

    @property
    def shards(self) -> dict[str, int]:
        """Bytes of the finished shards that are listed, by name."""
        return {entry["name"]: int(entry["bytes"]) for entry in self.listed}

    def plan(self, variants: dict[str, int]) -> Iterator[Shard]:
        """Yield the shards that so many variants of each stream are made of, in order."""
        for stream, count in variants.items():
            length = self.samples[stream]
            for variant in range(count):
                for number, first in enumerate(range(0, length, self.rows)):
                    yield Shard(stream, variant, number, first, min(self.rows, length - first))

    def present(self) -> dict[str, int]:
        """Return name and bytes of every finished tar in the folder."""
        with os.scandir(self.folder) as entries:
            return {
                entry.name: entry.stat().st_size
                for entry in entries
                if entry.name.endswith(".tar") and not entry.name.startswith(".")
            }

    def missing(self, variants: dict[str, int]) -> list[Shard]:
        """Return the shards of a plan that are still to be made.

        Raises:
            UserError: one is not as long as it was.
        """
        present = self.present()
        planned = list(self.plan(variants))
        for shard in planned:
            if present.get(shard.name, self.layout.tar_size(shard.rows)) != self.layout.tar_size(shard.rows):
                raise UserError(f"'{self.folder / shard.name}' is damaged; delete it to have it built again")
        return [shard for shard in planned if shard.name not in present]

    def is_ready(self, variants: dict[str, int]) -> bool:
        """Say whether all shards of so many variants are listed and there."""
        if set(variants) - set(self.samples):
            return False
        listed = self.shards
        return all(shard.name in listed for shard in self.plan(variants)) and not self.missing(variants)

    def variants(self) -> dict[str, int]:
        """Return the number of whole variants that are listed, by stream."""
        names, found = set(self.shards), {}
        for stream, length in self.samples.items():
            numbers, count = range(-(-length // self.rows)), 0
            while numbers and all(Shard(stream, count, n, 0, 0).name in names for n in numbers):
                count += 1
            found[stream] = count
        return found

    def to_bytes(self) -> bytes:
        """Return the content of ``shards.json``."""
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
        return json.dumps(content, indent=1, sort_keys=True).encode()

    def write(self) -> Section:
        """Write ``shards.json`` and return the section."""
        write_whole(make_folder(self.folder) / MANIFEST_NAME, self.to_bytes())
        return self

    def listing(self, variants: dict[str, int]) -> Section:
        """Return the section with all shards of a plan that are there listed, their indexes read."""
        known, present = {entry["name"]: entry for entry in self.listed}, self.present()
        for shard in self.plan(variants):
            if shard.name in present and shard.name not in known:
                known[shard.name] = _entry(self.folder, shard)
        return replace(self, listed=tuple(known[name] for name in sorted(known)))

    def rows_listed(self, stream: str) -> int:
        """Return the number of samples in the listed shards of a stream."""
        return sum(entry["rows"] for entry in self.listed if entry["name"].startswith(f"{stream}-"))

    def counts(self, stream: str) -> Counter[str]:
        """Return what was skipped or adjusted while the listed shards of a stream were made."""
        entries = [entry for entry in self.listed if entry["name"].startswith(f"{stream}-")]
        return sum((Counter(entry["counts"]) for entry in entries), Counter())


def _entry(folder: Path, shard: Shard) -> dict[str, Any]:
    path = folder / shard.index_name
    try:
        data = path.read_bytes()
        with np.load(path, allow_pickle=False) as index:
            size, tar_hash = int(index["tar_size"]), index["tar_hash"].tobytes().hex()
            counts = json.loads(index["counts"].tobytes())
    except (OSError, ValueError, KeyError) as error:
        tar = folder / shard.name
        raise UserError(f"'{path}' is damaged ({error}); delete '{tar}' to have both built again") from error
    return {
        "name": shard.name,
        "bytes": size,
        "rows": shard.rows,
        "blake2b": tar_hash,
        "index": path.name,
        "index_bytes": len(data),
        "index_blake2b": digest(data).hex(),
        "counts": counts,
    }


def section_folder(folder: str | Path, settings: Settings) -> Path:
    """Return where the section of some settings lies."""
    return Path(folder) / fingerprint(settings)[:NAME_DIGITS]


def read_section(folder: Path) -> Section | None:
    """Read a section's ``shards.json``; None where there is none.

    Raises:
        UserError: it is damaged, or of another version.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise UserError(f"'{folder}' was made by another version of this project; delete it")
        section = Section(
            folder=folder,
            settings=dict(content["settings"]),
            record=from_json(content["record"]),
            rows=int(content["rows"]),
            samples={stream: int(count) for stream, count in content["samples"].items()},
            listed=tuple(dict(entry) for entry in content["shards"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{path}' is damaged ({type(error).__name__}: {error}); delete '{folder}' to have it built again"
        ) from error
    return section


def refuse_older(folder: Path) -> None:
    """Refuse a cache folder of the layout before shards.

    Raises:
        UserError: it is one.
    """
    for name in OLD_NAMES:
        if (folder / name).is_dir():
            raise UserError(
                f"the latent cache '{folder}' was made by an older version; delete '{folder / name}'"
                " or name another cache.folder"
            )


def sections_in(folder: Path) -> Sequence[Path]:
    """Return the folders of a cache that look like sections, whatever is in them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and len(path.name) == NAME_DIGITS)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rows_of_shard(config: Config, layout: Layout) -> int:
    """Return how many samples a shard is to have: as configured, else about 64 MiB of whole batches."""
    if config.cache.shard_samples:
        return config.cache.shard_samples
    batch = config.cache.batch_size
    return max(SHARD_BYTES // layout.stride // batch, 1) * batch
