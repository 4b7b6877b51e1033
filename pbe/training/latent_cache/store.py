"""Stores of a latent cache: one for each set of settings, side by side in the cache's folder.

A store ``<first 12 digits of the fingerprint>/`` is a set of shards (:mod:`pbe.data.shards.format`), each of
consecutive samples of one variant, ``STREAM-VARIANT-NUMBER.tar``. Its ``shards.json`` says what the settings
are, how the rows are laid out, and which shards are there.

A row is one variant of one sample, a structured scalar of fixed size: half precision for latents and
features, a byte for each element of the masks. It is an ``.npy`` member of an uncompressed tar, so that any
WebDataset reader yields it. All members are of one size, so row ``i`` begins at ``start + i * stride``.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbe.config import Config
from pbe.data.shards.format import (
    BLOCK,
    HASH_BYTES,
    MANIFEST_NAME,
    DamagedIndexError,
    digest,
    index_entry,
    index_path,
    load_manifest,
    manifest_errors,
    new_shard,
    read_index,
)
from pbe.errors import UserError
from pbe.files import atomic_write, make_folder
from pbe.models import LatentDiffusion
from pbe.models.codec import Posterior
from pbe.training.latent_cache.settings import Settings, differences, fingerprint
from pbe.training.tasks.encoding import EncodedBatch

LOG = logging.getLogger(__name__)
FORMAT, VERSION = "pbe-latents", 1
NAME_DIGITS = 12
SHARD_BYTES = 64 * 2**20
# Masks of whole pixels have quarters at the latents' size (the mean of four pixels): exact in this unit.
MASK_UNIT = 252
MASKS = ("keep_mask", "valid")
LATENTS = ("image_mean", "image_std", "masked_mean", "masked_std")


def record_of(config: Config, model: LatentDiffusion) -> np.dtype[Any]:
    """Return the type of a row: sizes follow from the model, which may be on the meta device."""
    size = config.data.image_size // model.autoencoder.downsampling
    side, device = config.model.exemplar_encoder.image_size, model.unet.conv_in.weight.device
    with torch.no_grad():
        features = model.exemplar_encoder.features(torch.zeros(1, 3, side, side, device=device))
    latents = (config.model.autoencoder.latent_channels, size, size)
    fields: list[tuple[str, str, tuple[int, ...]]] = [(name, "<f2", latents) for name in LATENTS]
    fields += [(name, "|u1", (1, size, size)) for name in MASKS]
    return np.dtype([*fields, ("features", "<f2", tuple(features.shape[1:]))])


def to_records(batch: EncodedBatch, record: np.dtype[Any]) -> np.ndarray:
    """Return the rows of a batch, ``(b,)``, rounded to what is stored."""
    latents = dict(zip(LATENTS, (*batch.image, *batch.masked), strict=True))
    records = np.empty(len(batch.keep_mask), record)
    for name, value in {**latents, "features": batch.features}.items():
        records[name] = value.to(torch.float16).cpu().numpy()
    for name in MASKS:
        records[name] = (getattr(batch, name) * MASK_UNIT).round().to(torch.uint8).cpu().numpy()
    return records


def from_records(records: np.ndarray, counters: Tensor, *, class_only: bool = False) -> EncodedBatch:
    """Return rows ``(b,)`` and the global counters of their samples, int64 ``(b,)``, as a float32 batch.

    With ``class_only`` the exemplar's first token, that of the class, is the only one.
    """
    features = records["features"][:, :1] if class_only else records["features"]
    mean, std, masked_mean, masked_std, tokens = (
        torch.from_numpy(values.astype(np.float32))
        for values in (*(records[name] for name in LATENTS), features)
    )
    keep, valid = (torch.from_numpy(records[name].astype(np.float32)).div_(MASK_UNIT) for name in MASKS)
    return EncodedBatch(
        Posterior(mean, std), Posterior(masked_mean, masked_std), keep, valid, tokens, counters
    )


class Layout:
    """Where the rows of a shard lie, given their type (``record``): all members of the tar are of one size.

    Attributes:
        header: what stands before the values in every member, by NumPy's file format.
        start: offset of the first row's values.
        stride: bytes from one row to the next.
    """

    def __init__(self, record: np.dtype[Any]) -> None:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((), record), allow_pickle=False)
        self.record = record
        self.header = buffer.getvalue()[: -record.itemsize]
        self.start = BLOCK + len(self.header)
        self.stride = BLOCK + -(-(len(self.header) + record.itemsize) // BLOCK) * BLOCK

    def offset(self, row: int) -> int:
        """Return where the values of a row begin."""
        return self.start + row * self.stride

    def tar_size(self, rows: int) -> int:
        """Return the bytes of a shard's tar; it ends with two empty blocks, filled up to twenty."""
        return -(-(rows * self.stride + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def write_shard(
    path: Path, records: np.ndarray, variant: int, first: int, counts: dict[str, int] | None = None
) -> None:
    """Write consecutive samples of one variant as a shard, from position ``first`` of the epoch on.

    The columns of its index are those of packed shards, as far as there is something to tell: ``key_bytes``
    and ``key_end``, ``row_offset`` and ``row_size`` (of the values), ``row_hash`` (BLAKE2b, ``n 16``); and of
    the whole: ``tar_size``, ``tar_hash`` and, as JSON, ``counts`` of what was skipped or adjusted.
    """
    layout, count = Layout(records.dtype), len(records)
    keys = [f"{variant:03d}-{position:09d}" for position in range(first, first + count)]
    with new_shard(path) as shard:
        for key, record in zip(keys, records, strict=True):
            shard.add(f"{key}.npy", layout.header + record.tobytes())
        size, tar_hash = shard.end()
        hashes = b"".join(digest(record.tobytes()) for record in records)
        columns: dict[str, np.ndarray] = {
            "key_bytes": np.frombuffer("".join(keys).encode(), np.uint8),
            "key_end": np.cumsum([len(key) for key in keys], dtype=np.int64),
            "row_offset": layout.start + layout.stride * np.arange(count, dtype=np.int64),
            "row_size": np.full(count, records.dtype.itemsize, np.int64),
            "row_hash": np.frombuffer(hashes, np.uint8).reshape(count, HASH_BYTES),
            "tar_size": np.array(size, np.int64),
            "tar_hash": np.frombuffer(tar_hash, np.uint8),
            "counts": np.frombuffer(json.dumps(counts or {}, sort_keys=True).encode(), np.uint8),
        }
        shard.write_index(columns)


def rows_of_shard(config: Config, layout: Layout) -> int:
    """Return how many samples a shard is to have: as configured, else about 64 MiB of whole batches."""
    batch = config.cache.batch_size
    return config.cache.shard_samples or max(SHARD_BYTES // layout.stride // batch, 1) * batch


def variants_of(config: Config) -> dict[str, int]:
    """Return the variants that a configuration asks for, by stream; validation has one."""
    streams = {"train": config.cache.variants}
    return streams | ({"validation": 1} if config.data.validation_shards else {})


def shard_name(stream: str, variant: int, number: int) -> str:
    """Return the name of a tar."""
    return f"{stream}-{variant:03d}-{number:06d}.tar"


@dataclass(frozen=True)
class LatentShard:
    """So many consecutive samples of one variant (epoch) of a stream, from position ``first`` on."""

    name: str
    stream: str
    variant: int
    first: int
    rows: int


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
                    name = shard_name(stream, variant, number)
                    yield LatentShard(name, stream, variant, first, min(self.rows, length - first))

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
        whole = self.variants()
        enough = all(whole.get(stream, -1) >= count for stream, count in variants.items())
        return enough and not self.missing(variants)

    def variants(self) -> dict[str, int]:
        """Return the number of whole variants that are listed, by stream."""
        names, found = {entry["name"] for entry in self.listed}, {}
        for stream, length in self.samples.items():
            numbers, count = range(-(-length // self.rows)), 0
            while numbers and all(shard_name(stream, count, number) in names for number in numbers):
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
            "record": [[name, code, list(shape)] for name, code, shape in self.record.descr],  # type: ignore[misc]
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

    def counts(self, stream: str) -> tuple[Counter[str], int]:
        """Return what was skipped or adjusted in the listed shards of a stream, and their samples."""
        listed = [entry for entry in self.listed if entry["name"].startswith(f"{stream}-")]
        counts = sum((Counter(entry["counts"]) for entry in listed), Counter[str]())
        return counts, sum(entry["rows"] for entry in listed)


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
            record=np.dtype([(name, code, tuple(shape)) for name, code, shape in content["record"]]),
            rows=int(content["rows"]),
            samples={stream: int(count) for stream, count in content["samples"].items()},
            listed=tuple(dict(entry) for entry in content["shards"]),
        )


def tell_nearest(folder: str | Path, settings: Settings) -> None:
    """Where some settings have no store, but others do, log in what the nearest differs."""
    if store_folder(folder, settings).exists():
        return
    told = []
    for path in sorted(Path(folder).glob("?" * NAME_DIGITS)):
        with suppress(UserError):  # a damaged one is nobody's nearest
            if store := read_store(path):
                told.append((path.name, differences(store.settings, settings)))
    if told:
        name, others = min(told, key=lambda each: len(each[1]))
        LOG.warning("no latents in '%s' fit; the nearest, %s, has %s", folder, name, "; ".join(others))
