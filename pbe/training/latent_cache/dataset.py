"""Training from a latent cache: samples encoded once by the frozen networks, several variants of each.

:mod:`pbe.training.latent_cache.builder` makes the cache. Rows lie at regular places in the tars
(:mod:`pbe.training.latent_cache.store`), so reading one is a single read of a known piece of a file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from pbe.config import Config
from pbe.data.datamodule import CountingLoader, TrainingData
from pbe.data.randomness import permutation
from pbe.data.shards.format import DamagedIndexError, digest, index_path, read_index
from pbe.data.shards.index import LocalFiles
from pbe.errors import UserError
from pbe.training.latent_cache.store import LatentStore, from_records, shard_name, variants_of
from pbe.training.tasks.encoding import EncodedBatch


class CachedSamples(Dataset[tuple[int, int]]):
    """Cached samples by global counter; epoch and position follow from the index.

    Training's are shuffled anew every epoch, keyed by ``seed``; validation keeps the order of the cache. Of
    the store's variants the first ``variants`` are used. ``class_only`` hands out the first token of the
    exemplar only, ``verify`` compares every row with its hash.
    """

    def __init__(
        self,
        store: LatentStore,
        stream: str,
        variants: int,
        seed: int,
        *,
        class_only: bool = False,
        verify: bool = False,
    ) -> None:
        self.store, self.stream, self.variants, self.seed = store, stream, variants, seed
        self.class_only, self.verify = class_only, verify
        self.layout = store.layout
        self._files = LocalFiles()
        self._hashes: dict[str, np.ndarray] = {}
        self._paths: dict[tuple[int, int], str] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Return the number of cached samples, all variants together."""
        return self.store.samples[self.stream] * self.variants

    def _row(self, index: int) -> int:
        epoch, position = divmod(index, len(self))
        if self.stream != "train":
            return position
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self), self.seed, "cache", "order", epoch))
        return int(self._order[1][position])

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return (global counter, row); the rows of a batch are read together by :meth:`batch`."""
        return int(index), self._row(int(index))

    def _read(self, row: int) -> bytes:
        variant, position = divmod(row, self.store.samples[self.stream])
        number, inside = divmod(position, self.store.rows)
        path = self._path(variant, number)
        data = self._files.read(path, self.layout.offset(inside), self.layout.record.itemsize)
        if self.verify and digest(data) != self._hashes_of(path)[inside].tobytes():
            raise OSError(f"row {inside} of '{path}' is not what was written")
        return data

    def _path(self, variant: int, number: int) -> str:
        path = self._paths.get((variant, number))
        if path is None:  # kept: making one costs as much as reading a row
            path = str(self.store.folder / shard_name(self.stream, variant, number))
            self._paths[variant, number] = path
        return path

    def _hashes_of(self, path: str) -> np.ndarray:
        if path not in self._hashes:
            try:
                self._hashes[path] = read_index(index_path(Path(path)), ["row_hash"])["row_hash"]
            except DamagedIndexError as error:
                raise OSError(str(error)) from error
        return self._hashes[path]

    def batch(self, items: list[tuple[int, int]]) -> EncodedBatch:
        """Read the rows of a batch as float32 tensors."""
        counters, rows = zip(*items, strict=True)
        try:
            data = b"".join([self._read(row) for row in rows])
        except OSError as error:
            raise UserError(
                f"the latent cache cannot be read: {error}; delete that shard to have it built again"
            ) from error
        records = np.frombuffer(data, self.layout.record)
        return from_records(records, torch.tensor(counters, dtype=torch.int64), class_only=self.class_only)


class CachedDataModule(TrainingData):
    """Training and validation batches out of a finished store of a latent cache, as :class:`EncodedBatch`."""

    def __init__(self, config: Config, store: LatentStore) -> None:
        super().__init__(config)
        class_only = config.model.exemplar_encoder.tokens == "class"
        self._samples = {
            stream: CachedSamples(
                store, stream, count, self.seed, class_only=class_only, verify=self.config.verify
            )
            for stream, count in variants_of(config).items()
        }

    def samples(self, stream: str) -> CachedSamples:
        """Return the cached samples of a stream; training's are shuffled anew every epoch."""
        return self._samples[stream]

    def loader(self, stream: str) -> CountingLoader:
        """Return the batches of a stream; reading rows of local files is not worth a process."""
        return self._loader(stream, workers=0, collate=self.samples(stream).batch)
