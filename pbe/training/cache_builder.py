"""Building a latent cache: one that was stopped goes on where it was, and one process builds at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pbe.config import Config
from pbe.data.datamodule import CounterSampler, CountingLoader, ExemplarDataModule
from pbe.data.shards import find_shards
from pbe.errors import UserError
from pbe.files import make_folder
from pbe.models import LatentDiffusion
from pbe.training.encoding import encode_batch
from pbe.training.latent_cache import META_NAME, arrays_of, fingerprint, halved, read_meta

LOG = logging.getLogger(__name__)

PROGRESS_NAME = "progress.json"
SAVE_SECONDS = 10.0  # between two notes of how far a build has come
POLL_SECONDS = 0.5


def go_on() -> None:
    """Stand for a check that never stops anything."""


def ensure_cache(
    config: Config, model: LatentDiffusion, *, check: Callable[[], None] = go_on, builds: bool = True
) -> Path:
    """Build the cache of both streams unless a finished one with the same fingerprint is there.

    Args:
        config: ``cache.folder`` says where, ``cache.variants`` how many samples of each training picture.
        model: with its frozen parts loaded.
        check: called between batches; what it raises ends the build, which goes on there next time.
        builds: whether this process may build; one that may not waits for another one to do it.

    Raises:
        UserError: the folder holds a cache made with other settings or weights, or cannot be written to.
    """
    wanted, folder = fingerprint(config, model), Path(config.cache.folder)
    for stream in ("train", "validation"):
        if stream == "validation" and not config.data.validation_shards:
            continue
        while not _finished(folder, stream, wanted):
            if builds:
                with _locked(make_folder(folder), check):
                    if not _finished(folder, stream, wanted):
                        _build(config, model, stream, folder / stream, wanted, check)
            else:
                check()
                time.sleep(POLL_SECONDS)
    return folder


def cache_is_ready(config: Config, model: LatentDiffusion) -> bool:
    """Say whether the cache of a configuration is finished.

    Raises:
        UserError: it was made with other settings or weights.
    """
    streams = ("train", "validation") if config.data.validation_shards else ("train",)
    wanted, folder = fingerprint(config, model), Path(config.cache.folder)
    return all(_finished(folder, stream, wanted) for stream in streams)


def _finished(folder: Path, stream: str, wanted: str) -> bool:
    if not (folder / stream / META_NAME).is_file():
        return False
    if read_meta(folder / stream)["fingerprint"] != wanted:
        raise UserError(
            f"the latent cache '{folder}' was made with other data settings or weights; "
            "delete it or name another cache.folder"
        )
    return True


@contextmanager
def _locked(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back when its holder dies."""
    with (folder / ".lock").open("w") as lock:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    LOG.info("another process builds the latent cache '%s'; waiting for it", folder)
                told = True
                check()
                time.sleep(POLL_SECONDS)
            except OSError as error:
                raise UserError(f"cannot lock the latent cache '{folder}': {error.strerror}") from error
        yield


@torch.no_grad()
def _build(
    config: Config, model: LatentDiffusion, stream: str, folder: Path, mark: str, check: Callable[[], None]
) -> None:
    """Encode every sample into a partial folder, which gets its name when it is complete."""
    dataset = ExemplarDataModule(config.data, config.seed).dataset(stream)
    epochs = config.cache.variants if stream == "train" else 1
    partial = _Partial(folder.with_name(f".{folder.name}.partial"), mark, len(dataset) * epochs)
    sampler = CounterSampler(dataset, config.cache.batch_size, 0, 1, drop_last=False)
    loader = CountingLoader(sampler, stream, config.data.max_bad_share, False, config.data.num_workers)
    epoch, row = divmod(partial.rows, len(dataset))
    loader.place = (epoch, row)
    progress = tqdm(
        (batch for _ in range(epoch, epochs) for batch in loader),
        desc=f"caching {stream}", total=epochs * len(loader), disable=not config.trainer.progress,
        initial=epoch * len(loader) + row // config.cache.batch_size,
    )  # fmt: skip
    try:
        for batch in progress:
            check()
            partial.write(encode(config, model, batch), batch["sample_index"])
        partial.finish(folder, {"pictures": len(dataset), "stream": stream})
    except OSError as error:
        raise UserError(
            f"cannot write the latent cache '{folder.parent}': {error.strerror or error}; "
            "what is done is kept, the same command goes on"
        ) from error
    finally:
        with suppress(OSError):  # costs the batches since the last note, and must not hide what went wrong
            partial.save()
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


def encode(config: Config, model: LatentDiffusion, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Encode a batch of the data module in the precision that the cache is to have."""
    device = model.unet.conv_in.weight.device
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=halved(config)):
        return arrays_of(encode_batch(model, moved))


class _Partial:
    """The arrays of an unfinished cache and how many of their rows are done.

    Args:
        folder: of the partial cache; one of other settings is thrown away.
        mark: fingerprint.
        count: rows of the finished cache.
    """

    def __init__(self, folder: Path, mark: str, count: int) -> None:
        self.folder, self.mark, self.count = folder, mark, count
        self.files: dict[str, np.memmap[Any, Any]] = {}
        self.rows = self._rows_of_before()
        self._saved = time.monotonic()

    def _rows_of_before(self) -> int:
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads((self.folder / PROGRESS_NAME).read_text())
            if (note["fingerprint"], note["count"]) == (self.mark, self.count):
                return int(note["rows"])
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return 0

    def write(self, arrays: dict[str, Tensor], rows: Tensor) -> None:
        """Put the next rows in their place; ``rows`` are consecutive."""
        start = int(rows[0])
        for name, value in arrays.items():
            block = value.to(torch.float16).cpu().numpy()
            if name not in self.files:
                self.files[name] = self._open(name, block.shape[1:])
            self.files[name][start : start + len(block)] = block
        self.rows = start + len(rows)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def _open(self, name: str, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
        path = self.folder / f"{name}.npy"
        if self.rows:
            return np.lib.format.open_memmap(path, "r+")
        array = np.lib.format.open_memmap(path, "w+", np.float16, (self.count, *shape))
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a SIGBUS at some later row
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array

    def save(self) -> None:
        """Note how many rows are done, after the rows themselves."""
        if not self.folder.is_dir():
            return
        for array in self.files.values():
            array.flush()
        note = {"fingerprint": self.mark, "count": self.count, "rows": self.rows}
        temporary = self.folder / f".{PROGRESS_NAME}"
        temporary.write_text(json.dumps(note))
        os.replace(temporary, self.folder / PROGRESS_NAME)
        self._saved = time.monotonic()

    def finish(self, folder: Path, facts: dict[str, Any]) -> None:
        """Describe the cache and give it its name."""
        for array in self.files.values():
            array.flush()
        meta = {"fingerprint": self.mark, "count": self.count, **facts}
        (self.folder / META_NAME).write_text(json.dumps(meta, indent=2))
        (self.folder / PROGRESS_NAME).unlink(missing_ok=True)
        os.replace(self.folder, folder)


def size_on_disk(config: Config, model: LatentDiffusion) -> int:
    """Return the bytes that the cache of a configuration takes, from one sample of it."""
    total = 0
    module = ExemplarDataModule(config.data, config.seed)
    for stream, shards, variants in (
        ("train", config.data.train_shards, config.cache.variants),
        ("validation", config.data.validation_shards, 1),
    ):
        if not shards or not find_shards(shards):
            continue
        dataset = module.dataset(stream)
        batch = next(iter(CountingLoader(CounterSampler(dataset, 1, 0, 1, False), stream, 1.0, True, 0)))
        row = sum(value.numel() * 2 for value in encode(config, model, batch).values())
        total += row * len(dataset) * variants
    return total
