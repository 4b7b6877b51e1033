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
from pbe.data.datamodule import ExemplarDataModule, _start_worker
from pbe.data.dataset import FAULTS, collate, describe
from pbe.data.packing.records import write_whole
from pbe.data.shards.remote import is_url
from pbe.errors import UserError
from pbe.files import POLL_SECONDS, FileLock, lock, make_folder, try_lock
from pbe.models import LatentDiffusion
from pbe.training.latent_cache.record import Layout, index_bytes, record_of, tar_bytes, to_records
from pbe.training.latent_cache.section import (
    MANIFEST_NAME,
    Section,
    Shard,
    read_section,
    refuse_older,
    rows_of_shard,
    section_folder,
    variants_of,
)
from pbe.training.latent_cache.settings import Settings, fingerprint, halved, settings_of, with_all_tokens
from pbe.training.tasks.encoding import EncodedBatch, encode_batch

LOG = logging.getLogger(__name__)
LOCK_NAME = ".lock"
# without locks a shard may be made twice, with the same bytes
WITHOUT_LOCKS = "give every builder its own part by --shard"


def go_on() -> None:
    """Stand for a check that never stops anything."""


@dataclass(frozen=True)
class Build:
    """A build and what it is to be done with.

    Attributes:
        config: says which samples.
        model: encodes them.
        data: makes them.
        section: that they go to.
        check: called between batches; what it raises ends the build.
        share: part ``i`` of ``n`` of the shards; others are left to other builders.
        quiet: show no progress.
    """

    config: Config
    model: LatentDiffusion
    data: ExemplarDataModule
    section: Section
    check: Callable[[], None]
    share: tuple[int, int]
    quiet: bool

    def missing(self, stream: str, variants: int) -> list[Shard]:
        """Return the shards of this builder's share that are still to be made."""
        part, parts = self.share
        missing = set(self.section.missing({stream: variants}))
        planned = enumerate(self.section.plan({stream: variants}))
        return [shard for place, shard in planned if place % parts == part and shard in missing]


def find_cache(config: Config, model: LatentDiffusion) -> Section | None:
    """Return the finished section that serves a configuration, or None.

    Raises:
        UserError: the folder was made by an older version, or the section is damaged.
    """
    return _find(config, settings_of(config, model))


def _find(config: Config, settings: Settings) -> Section | None:
    if is_url(config.cache.folder):
        raise UserError(
            f"a latent cache lies on a local or shared disk; cache.folder '{config.cache.folder}' is a URL"
        )
    refuse_older(Path(config.cache.folder))
    # one with all tokens serves those who want the class token alone, which is its first
    grid = config.model.exemplar_encoder.token_grid
    for candidate in (settings, with_all_tokens(settings, grid)):
        section = _read(config, candidate) if candidate is not None else None
        if section is not None and section.is_ready(variants_of(config)):
            return section
    return None


def _read(config: Config, settings: Settings) -> Section | None:
    section = read_section(section_folder(config.cache.folder, settings))
    if section is not None and fingerprint(section.settings) != fingerprint(settings):
        raise UserError(f"'{section.folder}' is not what its name says; delete it to have it built again")
    return section


def ensure_cache(
    config: Config,
    model: LatentDiffusion,
    *,
    check: Callable[[], None] = go_on,
    share: tuple[int, int] = (0, 1),
    quiet: bool = False,
) -> Section:
    """Build what is missing of the cache of both streams, together with others who do the same.

    Args:
        config: ``cache.folder`` says where, ``cache.variants`` how many samples of each training picture.
        model: with its frozen parts loaded.
        check: called between batches; what it raises ends the build, which goes on there next time.
        share: build part ``i`` of ``n`` (from 0) only, and do not wait for the others.
        quiet: show no progress.

    Returns:
        The section; it is complete unless it was to be a share only.

    Raises:
        UserError: made by an older version, damaged, too many unusable pictures, or it cannot be written.
    """
    settings = settings_of(config, model)
    if (found := _find(config, settings)) is not None:
        return found
    folder = Path(config.cache.folder)  # made once the data are open
    data = ExemplarDataModule(config.data, config.seed)
    try:
        section = _open(config, model, settings, data, check)
        build = Build(config, model, data, section, check, share, quiet)
        _check_space(build)
        for stream, variants in variants_of(config).items():
            _build(build, stream, variants)
        return _list(build)
    except OSError as error:
        raise UserError(
            f"cannot write the latent cache '{folder}': {error.strerror or error}; "
            "what is done is kept, the same command goes on"
        ) from error


def _open(
    config: Config,
    model: LatentDiffusion,
    settings: Settings,
    data: ExemplarDataModule,
    check: Callable[[], None],
) -> Section:
    """Return the section of some settings, made where there is none; sweep up what killed builders left."""
    samples = {stream: len(data.dataset(stream)) for stream in variants_of(config)}
    record = record_of(config, model)
    folder = make_folder(section_folder(config.cache.folder, settings))
    with lock(folder / LOCK_NAME, check=check, without_locks=WITHOUT_LOCKS):
        section = _read(config, settings)
        if section is None:
            section = Section(
                folder, settings, record, rows_of_shard(config, Layout(record)), samples
            ).write()
        _sweep(folder)
    if (section.record, section.samples) != (record, samples):
        raise UserError(f"'{folder}' holds other samples than its settings say; delete it")
    return section


def _sweep(folder: Path) -> None:
    """Remove the temporary files of builders that are no more."""
    for path in folder.glob(".*.tmp"):
        name = path.name[1:].rsplit(".", 2)[0]
        if name == MANIFEST_NAME:
            path.unlink(missing_ok=True)
        elif claim := _claim(folder, name):
            path.unlink(missing_ok=True)
            claim.release()


def _claim(folder: Path, name: str) -> FileLock | None:
    """Lock a shard, by the name of its tar or index, so that others pass it over; None when another has."""
    stem = name.removesuffix(".tar").removesuffix(".index.npz")
    return try_lock(folder / f".{stem}.lock", without_locks=WITHOUT_LOCKS)


def _check_space(build: Build) -> None:
    """Refuse to begin what the disk cannot hold."""
    layout, streams = build.section.layout, variants_of(build.config).items()
    shards = [shard for stream, variants in streams for shard in build.missing(stream, variants)]
    needed, free = (
        sum(layout.tar_size(s.rows) for s in shards),
        shutil.disk_usage(build.section.folder).free,
    )
    if needed > free:
        raise UserError(
            f"the latent cache '{build.section.folder}' needs {needed / 2**30:.2f} GiB more, "
            f"but the disk has {free / 2**30:.2f}; make room or name another cache.folder"
        )


def _build(build: Build, stream: str, variants: int) -> None:
    """Make the missing shards of a stream, or wait until others have made them."""
    if not (missing := build.missing(stream, variants)):
        return
    total = sum(shard.rows for shard in missing)
    told = False
    with tqdm(
        desc=f"caching {stream}", total=total, unit=" samples", smoothing=0.05,
        disable=build.quiet or not build.config.trainer.progress,
    ) as progress:  # fmt: skip
        while missing:
            if any(_is_free(build.section, shard) for shard in missing):
                _make(build, stream, missing, progress)
            else:
                if not told:
                    LOG.info("others build what is left of '%s'; waiting", build.section.folder)
                told = True
                build.check()
                time.sleep(POLL_SECONDS)
            missing = [shard for shard in missing if not (build.section.folder / shard.name).exists()]
            # what others have made counts too
            progress.update(max(total - sum(shard.rows for shard in missing) - progress.n, 0))


def _is_free(section: Section, shard: Shard) -> bool:
    """Say whether nobody is making a shard."""
    claim = _claim(section.folder, shard.name)
    if claim is not None:
        claim.release()
    return claim is not None


class ShardFeed:
    """The counters of batches, shard by shard, in a shape that a DataLoader takes as its batch sampler.

    A shard is claimed when its first batch is asked for; those of other builders are passed over.

    Args:
        section: the shards belong to.
        shards: to be made.
        batch_size: samples encoded together; a shard's last batch has what is left.

    Attributes:
        claimed: what has been claimed and is not finished, in order.
    """

    def __init__(self, section: Section, shards: Sequence[Shard], batch_size: int) -> None:
        self.section, self.shards, self.batch_size = section, shards, batch_size
        self.claimed: deque[tuple[Shard, FileLock]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the counters of each batch."""
        for shard in self.shards:
            claim = _claim(self.section.folder, shard.name)
            if claim is None:
                continue
            if (self.section.folder / shard.name).exists():
                claim.release()
                continue
            self.claimed.append((shard, claim))
            start = shard.variant * self.section.samples[shard.stream] + shard.first
            for first in range(start, start + shard.rows, self.batch_size):
                yield list(range(first, min(first + self.batch_size, start + shard.rows)))

    def finish(self) -> None:
        """Release the claim on the oldest shard."""
        self.claimed.popleft()[1].release()


def _make(build: Build, stream: str, shards: Sequence[Shard], progress: tqdm[Any]) -> None:
    """Make those of some shards that nobody else is making."""
    feed = ShardFeed(build.section, shards, build.config.cache.batch_size)
    workers = build.config.data.num_workers
    loader: DataLoader[Any] = DataLoader(
        build.data.dataset(stream), batch_sampler=feed, num_workers=workers, collate_fn=collate,
        worker_init_fn=_start_worker, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    batches = iter(loader)
    rows, counts = list[np.ndarray](), Counter[str]()
    seen, done = Counter[str](), 0
    try:
        for batch in batches:
            build.check()
            counts.update(batch["counts"])
            seen.update(batch["counts"])
            done += len(batch.get("image", ()))
            _check_batch(build, stream, batch, seen, done)
            rows.append(to_records(encode(build.config, build.model, batch), build.section.record))
            progress.update(len(rows[-1]))
            shard = feed.claimed[0][0]
            if sum(len(part) for part in rows) == shard.rows:
                write_shard(build.section, shard, np.concatenate(rows), counts)
                feed.finish()
                rows, counts = [], Counter()
    finally:
        while feed.claimed:
            feed.finish()
        if workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _check_batch(build: Build, stream: str, batch: dict[str, Any], seen: Counter[str], done: int) -> None:
    """Complain where no picture was found for a sample, or too many cannot be used."""
    if batch["missing"]:
        raise UserError(
            f"no usable picture found in a long row of {stream} pictures ({describe(seen)}); "
            "check the shards, data.min_box_area and data.max_box_area"
        )
    _check_faults(build, stream, seen, max(done, build.section.samples[stream]))


def _check_faults(build: Build, stream: str, counts: Counter[str], samples: int) -> None:
    faults = {name: count for name, count in counts.items() if name in FAULTS}
    if sum(faults.values()) > build.config.data.max_bad_share * samples:
        raise UserError(
            f"too many {stream} pictures cannot be used ({describe(faults)}); "
            "put the shards right or raise data.max_bad_share"
        )


def encode(config: Config, model: LatentDiffusion, batch: dict[str, Any]) -> EncodedBatch:
    """Encode a batch of the data module in the precision that the cache is to have."""
    device = model.unet.conv_in.weight.device
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=halved(config)):
        return encode_batch(model, moved)


def write_shard(section: Section, shard: Shard, records: np.ndarray, counts: Counter[str]) -> None:
    """Write a shard's index, then its tar; each appears when it is whole."""
    tar = tar_bytes(records, shard.variant, shard.first)
    index = index_bytes(records, shard.variant, shard.first, tar, dict(+counts))
    write_whole(section.folder / shard.index_name, index)
    write_whole(section.folder / shard.name, tar)


def _list(build: Build) -> Section:
    """List the shards that are there, unless too many pictures were of no use."""
    variants = variants_of(build.config)
    with lock(build.section.folder / LOCK_NAME, check=build.check, without_locks=WITHOUT_LOCKS):
        section = (read_section(build.section.folder) or build.section).listing(variants)
        for stream in variants:
            counts, samples = section.counts(stream), section.rows_listed(stream)
            _check_faults(build, stream, counts, samples)
            if counts and not build.quiet:
                LOG.info("%s cache: %d samples; %s", stream, samples, describe(counts))
        return section.write()
