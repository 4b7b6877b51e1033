"""Building a latent cache: its shards are tasks of their own, which any number of processes share.

A shard depends on its samples and on nothing else, so the bytes are the same whoever makes it, and whatever
was killed meanwhile. Index and tar appear under their names when they are whole; ``shards.json`` lists them
when nothing is missing any more.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from pbe.config import Config
from pbe.data.datamodule import TrainingData, start_worker
from pbe.data.dataset import check_counts, collate, describe
from pbe.data.shards.format import MANIFEST_NAME
from pbe.data.shards.remote import is_url
from pbe.errors import UserError
from pbe.files import POLL_SECONDS, FileLock, lock, make_folder, try_lock
from pbe.models import LatentDiffusion
from pbe.training.latent_cache.settings import (
    Settings,
    differences,
    fingerprint,
    halved,
    serving_settings,
    settings_of,
)
from pbe.training.latent_cache.store import (
    LATENTS,
    MASKS,
    NAME_DIGITS,
    LatentShard,
    LatentStore,
    Layout,
    read_store,
    record_of,
    rows_of_shard,
    store_folder,
    tell_nearest,
    to_records,
    variants_of,
    write_shard,
)
from pbe.training.tasks.encoding import EncodedBatch, encode_batch

LOG = logging.getLogger(__name__)
LOCK_NAME = ".lock"
OLD_NAMES = ("train", "validation", ".train.partial", ".validation.partial")  # of the layout before shards
# without locks a shard may be made twice, with the same bytes
WITHOUT_LOCKS = "give every builder its own part by --shard"
NO_STORE = "not a store of latents; it may be deleted"


def find_cache(config: Config, model: LatentDiffusion) -> LatentStore | None:
    """Return the finished store that serves a configuration, or None."""
    return _find(config, settings_of(config, model))


def _find(config: Config, settings: Settings) -> LatentStore | None:
    folder = config.cache.folder
    if is_url(folder):
        raise UserError(f"a latent cache must be on a local or shared disk; cache.folder '{folder}' is a URL")
    for path in _older(folder):
        raise UserError(
            f"the latent cache '{folder}' was made by an older version; delete '{path}'"
            " or name another cache.folder"
        )
    for candidate in serving_settings(settings, config):
        store = _read(config, candidate)
        if store is not None and store.is_ready(variants_of(config)):
            return store
    return None


def _older(folder: str | Path) -> list[Path]:
    return [path for name in OLD_NAMES if (path := Path(folder) / name).is_dir()]


def _read(config: Config, settings: Settings) -> LatentStore | None:
    store = read_store(store_folder(config.cache.folder, settings))
    if store is not None and fingerprint(store.settings) != fingerprint(settings):
        raise UserError(f"'{store.folder}' is not what its name says; delete it to have it built again")
    return store


def ensure_cache(
    config: Config,
    model: LatentDiffusion,
    *,
    check: Callable[[], object] = lambda: None,
    share: tuple[int, int] = (0, 1),
    quiet: bool = False,
) -> LatentStore:
    """Build what is missing of the cache of both streams, together with others who do the same.

    Args:
        config: ``cache.folder`` says where, ``cache.variants`` how many samples of each training image.
        model: with its frozen parts loaded.
        check: called between batches; what it raises ends the build, which resumes there next time.
        share: build part ``i`` of ``n`` (from 0) only; the store is not complete then.
        quiet: show no progress.
    """
    settings = settings_of(config, model)
    if (found := _find(config, settings)) is not None:
        return found
    tell_nearest(config.cache.folder, settings)
    try:
        builder = _Builder(config, model, settings, check, share, quiet)
        builder.check_space()
        for stream in variants_of(config):
            builder.build(stream)
        return builder.list_shards()
    except OSError as error:
        raise UserError(
            f"cannot write the latent cache '{config.cache.folder}': {error.strerror or error}; "
            "what is done is kept, and the same command resumes"
        ) from error


def _lock_shard(folder: Path, stem: str) -> FileLock | None:
    """Lock a shard so that others pass it over; None when another process has."""
    return try_lock(folder / f".{stem}.lock", without_locks=WITHOUT_LOCKS)


class ShardFeed:
    """The counters of batches, shard by shard, in a shape that a DataLoader takes as its batch sampler.

    A shard is locked when its first batch is asked for; those of other builders are passed over. A shard's
    last batch has what is left. ``locked`` has been locked and is not finished, in order.
    """

    def __init__(self, store: LatentStore, shards: Sequence[LatentShard], batch_size: int) -> None:
        self.store, self.shards, self.batch_size = store, shards, batch_size
        self.locked: deque[tuple[LatentShard, FileLock]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the counters of each batch."""
        for shard in self.shards:
            path = self.store.folder / shard.name
            held = _lock_shard(path.parent, path.stem)
            if held is None:
                continue
            if path.exists():
                held.release()
                continue
            self.locked.append((shard, held))
            start = shard.variant * self.store.samples[shard.stream] + shard.first
            for first in range(start, start + shard.rows, self.batch_size):
                yield list(range(first, min(first + self.batch_size, start + shard.rows)))

    def finish(self) -> None:
        """Release the lock of the oldest shard."""
        self.locked.popleft()[1].release()


class _Builder:
    """One process of those that build a store; see :func:`ensure_cache`."""

    def __init__(
        self,
        config: Config,
        model: LatentDiffusion,
        settings: Settings,
        check: Callable[[], object],
        share: tuple[int, int],
        quiet: bool,
    ) -> None:
        self.config, self.model, self.check, self.share, self.quiet = config, model, check, share, quiet
        self.data, self.variants = TrainingData(config), variants_of(config)
        self.store = self._open(settings)

    def _open(self, settings: Settings) -> LatentStore:
        """Return the store, made where there is none; remove what killed builders left."""
        # the folder is made once the data are open
        samples = {stream: len(self.data.dataset(stream)) for stream in self.variants}
        record = record_of(self.config, self.model)
        folder = make_folder(store_folder(self.config.cache.folder, settings))
        with lock(folder / LOCK_NAME, check=self.check, without_locks=WITHOUT_LOCKS):
            store = _read(self.config, settings)
            if store is None:
                rows = rows_of_shard(self.config, Layout(record))
                store = LatentStore(folder, settings, record, rows, samples).write()
            _remove_temporary(folder)
        if (store.record, store.samples) != (record, samples):
            raise UserError(f"'{folder}' holds other samples than its settings say; delete it")
        return store

    def missing(self, stream: str) -> list[LatentShard]:
        """Return the shards of this builder's share that are still to be made."""
        part, parts = self.share
        variants = {stream: self.variants[stream]}
        missing = set(self.store.missing(variants))
        planned = enumerate(self.store.plan(variants))
        return [shard for place, shard in planned if place % parts == part and shard in missing]

    def check_space(self) -> None:
        """Refuse to begin what the disk cannot hold."""
        layout = self.store.layout
        shards = [shard for stream in self.variants for shard in self.missing(stream)]
        needed = sum(layout.tar_size(shard.rows) for shard in shards)
        free = shutil.disk_usage(self.store.folder).free
        if needed > free:
            raise UserError(
                f"the latent cache '{self.store.folder}' needs {needed / 2**30:.2f} GiB more, "
                f"but the disk has {free / 2**30:.2f}; make room or name another cache.folder"
            )

    def build(self, stream: str) -> None:
        """Make the missing shards of a stream, or wait until others have made them."""
        if not (missing := self.missing(stream)):
            return
        total = sum(shard.rows for shard in missing)
        waited = False
        with tqdm(
            desc=f"caching {stream}", total=total, unit=" samples", smoothing=0.05,
            disable=self.quiet or not self.config.trainer.progress,
        ) as progress:  # fmt: skip
            while missing:
                if any(self._is_free(shard) for shard in missing):
                    self._make(stream, missing, progress)
                else:
                    if not waited:
                        LOG.info("others build what is left of '%s'; waiting", self.store.folder)
                    waited = True
                    self.check()
                    time.sleep(POLL_SECONDS)
                missing = [shard for shard in missing if not (self.store.folder / shard.name).exists()]
                # what others have made counts too
                progress.update(max(total - sum(shard.rows for shard in missing) - progress.n, 0))

    def _is_free(self, shard: LatentShard) -> bool:
        """Say whether nobody is making a shard."""
        path = self.store.folder / shard.name
        if (held := _lock_shard(path.parent, path.stem)) is not None:
            held.release()
        return held is not None

    def _make(self, stream: str, shards: Sequence[LatentShard], progress: tqdm[Any]) -> None:
        """Make those of some shards that nobody else is making."""
        feed = ShardFeed(self.store, shards, self.config.cache.batch_size)
        workers = self.config.data.num_workers
        loader: DataLoader[Any] = DataLoader(
            self.data.dataset(stream), batch_sampler=feed, num_workers=workers, collate_fn=collate,
            worker_init_fn=start_worker, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        batches = iter(loader)
        rows, counts = list[np.ndarray](), Counter[str]()  # of a shard
        seen, done = Counter[str](), 0  # of all
        try:
            for batch in batches:
                self.check()
                counts.update(batch["counts"])
                seen.update(batch["counts"])
                done += len(batch.get("image", ()))
                samples = max(done, self.store.samples[stream])
                check_counts(stream, seen, self.config.data.max_bad_share * samples, batch["missing"])
                rows.append(to_records(encode(self.config, self.model, batch), self.store.record))
                progress.update(len(rows[-1]))
                shard = feed.locked[0][0]
                if sum(len(part) for part in rows) == shard.rows:
                    path = self.store.folder / shard.name
                    write_shard(path, np.concatenate(rows), shard.variant, shard.first, dict(+counts))
                    feed.finish()
                    rows, counts = [], Counter()
        finally:
            while feed.locked:
                feed.finish()
            if workers:
                batches._shutdown_workers()  # type: ignore[attr-defined]

    def list_shards(self) -> LatentStore:
        """List the shards that are there, unless too many images were of no use."""
        folder = self.store.folder
        with lock(folder / LOCK_NAME, check=self.check, without_locks=WITHOUT_LOCKS):
            store = (read_store(folder) or self.store).with_finished(self.variants)
            for stream in self.variants:
                counts, samples = store.counts(stream)
                check_counts(stream, counts, self.config.data.max_bad_share * samples)
                if counts and not self.quiet:
                    LOG.info("%s cache: %d samples; %s", stream, samples, describe(counts))
            return store.write()


def _remove_temporary(folder: Path) -> None:
    """Remove the temporary files of builders that are no more."""
    for path in folder.glob(".*.tmp"):
        name = path.name[1:].rsplit(".", 2)[0]
        if name == MANIFEST_NAME:
            path.unlink(missing_ok=True)
        elif held := _lock_shard(folder, name.removesuffix(".tar").removesuffix(".index.npz")):
            path.unlink(missing_ok=True)
            held.release()


def encode(config: Config, model: LatentDiffusion, batch: dict[str, Any]) -> EncodedBatch:
    """Encode a batch of the data module in the precision that the cache is to have."""
    device = model.unet.conv_in.weight.device
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=halved(config)):
        return encode_batch(model, moved)


@dataclass(frozen=True)
class CacheSize:
    """What a cache takes.

    Attributes:
        sample: bytes of one variant of one sample in its shard.
        parts: the same by what they hold.
        samples: variants and samples of an epoch, by stream; without the streams that have no shards yet.
        total: bytes of all shards without their indexes, which add less than a hundredth.
    """

    sample: int
    parts: dict[str, int]
    samples: dict[str, tuple[int, int]]
    total: int


def size_on_disk(config: Config, model: LatentDiffusion) -> CacheSize:
    """Return what the cache of a configuration takes when it is built; the model may be on the meta device.

    Streams whose shards cannot be found count as nothing.
    """
    layout = Layout(record_of(config, model))
    data, samples, total = TrainingData(config), {}, 0
    rows = rows_of_shard(config, layout)
    for stream, variants in variants_of(config).items():
        try:
            count = len(data.dataset(stream))
        except UserError:
            continue
        samples[stream] = (variants, count)
        whole, rest = divmod(count, rows)
        total += variants * (whole * layout.tar_size(rows) + (layout.tar_size(rest) if rest else 0))
    fields = {name: layout.record[name].itemsize for name in layout.record.names or ()}
    parts = {
        "latents": sum(fields[name] for name in LATENTS),
        "masks": sum(fields[name] for name in MASKS),
        "features": fields["features"],
    }
    parts["headers and filling"] = layout.stride - sum(parts.values())
    return CacheSize(layout.stride, parts, samples, total)


def describe_folder(config: Config, model: LatentDiffusion) -> list[str]:
    """Return a line for each store of a cache's folder, and for what older versions made there.

    A line holds name, size, variants of each stream, and what a training with this configuration would do
    with it, or in which settings it differs.
    """
    folder, settings = Path(config.cache.folder), settings_of(config, model)
    found = [path for path in folder.glob("*") if path.is_dir() and len(path.name) == NAME_DIGITS]
    lines = []
    for path in sorted(found):
        try:
            store = read_store(path)
            text = _describe(store, config, settings) if store else NO_STORE
        except UserError as error:
            text = str(error)
        lines.append(f"{path.name}  {_size(path)}  {text}")
    older = _older(folder)
    return [*lines, *(f"{path.name}  {_size(path)}  made by an older version; delete it" for path in older)]


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{total / 2**30:.2f} GiB"


def _describe(store: LatentStore, config: Config, settings: Settings) -> str:
    whole = store.variants()
    holds = ", ".join(
        f"{stream} {count:,} x {whole[stream]}" for stream, count in sorted(store.samples.items())
    )
    return f"{holds}  {_verdict(store, config, settings)}"


def _verdict(store: LatentStore, config: Config, settings: Settings) -> str:
    if all(differences(store.settings, candidate) for candidate in serving_settings(settings, config)):
        return f"does not fit: {'; '.join(differences(store.settings, settings))}"
    wanted = variants_of(config)
    if store.is_ready(wanted):
        return "serves this configuration"
    missing, planned = len(store.missing(wanted)), len(list(store.plan(wanted)))
    return f"fits, unfinished: {missing} of {planned} shards are missing"
