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
from pbe.training.latent_cache.record import Layout, record_of, to_records, write_shard
from pbe.training.latent_cache.settings import Settings, fingerprint, halved, settings_of, with_all_tokens
from pbe.training.latent_cache.store import (
    LatentShard,
    LatentStore,
    read_store,
    refuse_older,
    rows_of_shard,
    store_folder,
    variants_of,
)
from pbe.training.tasks.encoding import EncodedBatch, encode_batch

LOG = logging.getLogger(__name__)
LOCK_NAME = ".lock"
# without locks a shard may be made twice, with the same bytes
WITHOUT_LOCKS = "give every builder its own part by --shard"


def find_cache(config: Config, model: LatentDiffusion) -> LatentStore | None:
    """Return the finished store that serves a configuration, or None."""
    return _find(config, settings_of(config, model))


def _find(config: Config, settings: Settings) -> LatentStore | None:
    if is_url(config.cache.folder):
        raise UserError(
            f"a latent cache lies on a local or shared disk; cache.folder '{config.cache.folder}' is a URL"
        )
    refuse_older(Path(config.cache.folder))
    # one with all tokens serves those who want the class token alone, which is its first
    grid = config.model.exemplar_encoder.token_grid
    for candidate in (settings, with_all_tokens(settings, grid)):
        store = _read(config, candidate) if candidate is not None else None
        if store is not None and store.is_ready(variants_of(config)):
            return store
    return None


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
        share: build part ``i`` of ``n`` (from 0) only, and do not wait for the others.
        quiet: show no progress.

    Returns:
        The store; it is complete unless it was to be a share only.
    """
    settings = settings_of(config, model)
    if (found := _find(config, settings)) is not None:
        return found
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

    A shard is locked when its first batch is asked for; those of other builders are passed over.

    Args:
        store: the shards belong to.
        shards: to be made.
        batch_size: samples encoded together; a shard's last batch has what is left.

    Attributes:
        locked: what has been locked and is not finished, in order.
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
        rows, counts = list[np.ndarray](), Counter[str]()
        seen, done = Counter[str](), 0
        try:
            for batch in batches:
                self.check()
                counts.update(batch["counts"])
                seen.update(batch["counts"])
                done += len(batch.get("image", ()))
                self._check_counts(stream, seen, max(done, self.store.samples[stream]), batch["missing"])
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

    def _check_counts(self, stream: str, counts: Counter[str], samples: int, missing: int = 0) -> None:
        check_counts(stream, counts, self.config.data.max_bad_share * samples, missing)

    def list_shards(self) -> LatentStore:
        """List the shards that are there, unless too many images were of no use."""
        folder = self.store.folder
        with lock(folder / LOCK_NAME, check=self.check, without_locks=WITHOUT_LOCKS):
            store = (read_store(folder) or self.store).with_finished(self.variants)
            for stream in self.variants:
                counts, samples = store.counts(stream), store.rows_listed(stream)
                self._check_counts(stream, counts, samples)
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
