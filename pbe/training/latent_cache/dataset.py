"""Training from a latent cache: samples encoded once by the frozen networks, several variants of each.

:mod:`pbe.training.latent_cache.builder` makes the cache, :mod:`pbe.training.latent_cache.section` says what
is where. Rows lie at regular places in the tars, so reading one is a single read of a known piece of a file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pbe.config import Config
from pbe.data.datamodule import CountingLoader
from pbe.data.randomness import permutation
from pbe.data.shards.index import LocalFiles
from pbe.errors import UserError
from pbe.training.data import TimedLoader, TrainingData
from pbe.training.latent_cache.record import digest, from_records
from pbe.training.latent_cache.section import Section, Shard, variants_of
from pbe.training.tasks.encoding import EncodedBatch


class CachedSamples(Dataset[tuple[int, int]]):
    """Cached samples by global counter; epoch and position follow from the index.

    Args:
        section: of the cache.
        stream: ``train``, shuffled anew every epoch, or ``validation``, which keeps the order of the cache.
        variants: to use; the section has as many or more.
        seed: of the run; keys the order of each epoch.
        class_only: hand out the first token of the exemplar only.
        verify: compare every row with its hash.
    """

    def __init__(
        self,
        section: Section,
        stream: str,
        variants: int,
        seed: int,
        *,
        class_only: bool = False,
        verify: bool = False,
    ) -> None:
        self.section, self.stream, self.variants, self.seed = section, stream, variants, seed
        self.class_only, self.verify = class_only, verify
        self.layout = section.layout
        self._files = LocalFiles()
        self._hashes: dict[str, np.ndarray] = {}
        self._paths: dict[tuple[int, int], str] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Return the number of cached samples, all variants together."""
        return self.section.samples[self.stream] * self.variants

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
        variant, position = divmod(row, self.section.samples[self.stream])
        number, inside = divmod(position, self.section.rows)
        path = self._path(variant, number)
        data = self._files.read(path, self.layout.offset(inside), self.layout.record.itemsize)
        if self.verify and digest(data) != self._hash(variant, number, inside):
            raise OSError(f"row {inside} of '{path}' is not what was written")
        return data

    def _path(self, variant: int, number: int) -> str:
        path = self._paths.get((variant, number))
        if path is None:  # kept: making one costs as much as reading a row
            shard = Shard(self.stream, variant, number, 0, 0)
            path = self._paths[variant, number] = str(self.section.folder / shard.name)
        return path

    def _hash(self, variant: int, number: int, inside: int) -> bytes:
        shard = Shard(self.stream, variant, number, 0, 0)
        if shard.name not in self._hashes:
            try:
                with np.load(self.section.folder / shard.index_name, allow_pickle=False) as index:
                    self._hashes[shard.name] = index["row_hash"]
            except (ValueError, KeyError) as error:
                raise OSError(f"'{shard.index_name}' is damaged ({error})") from error
        return bytes(self._hashes[shard.name][inside].tobytes())

    def batch(self, items: list[tuple[int, int]]) -> EncodedBatch:
        """Read the rows of a batch as float32 tensors.

        Raises:
            UserError: a shard is gone, cut short or, with ``verify``, damaged.
        """
        counters, rows = zip(*items, strict=True)
        try:
            data = b"".join([self._read(row) for row in rows])
        except OSError as error:
            raise UserError(
                f"the latent cache cannot be read: {error}; delete that shard to have it built again"
            ) from error
        records = np.frombuffer(data, self.layout.record)
        return from_records(records, torch.tensor(counters, dtype=torch.int64), class_only=self.class_only)


class CachedLoader(TimedLoader):
    """Batches out of a cache, which holds nothing that could be skipped."""

    def _count(self, batch: Any) -> None:
        """Count nothing."""


class CachedDataModule(TrainingData):
    """Training and validation batches out of a latent cache, as :class:`EncodedBatch`.

    Args:
        config: the experiment.
        section: a finished one that serves it.
    """

    loader_type = CachedLoader

    def __init__(self, config: Config, section: Section) -> None:
        super().__init__(config)
        self.section = section
        self.variants = variants_of(config)
        self.class_only = config.model.exemplar_encoder.tokens == "class"

    def samples(self, stream: str) -> CachedSamples:
        """Return the cached samples of a stream; training's are shuffled anew every epoch."""
        return CachedSamples(
            self.section, stream, self.variants[stream], self.seed,
            class_only=self.class_only, verify=self.config.verify,
        )  # fmt: skip

    def workers(self) -> int:
        """Return 0: reading rows of local files is not worth a process."""
        return 0

    def _loader(self, stream: str) -> CountingLoader:
        loader = super()._loader(stream)
        assert isinstance(loader.dataset, CachedSamples)
        loader.collate_fn = loader.dataset.batch
        return loader
