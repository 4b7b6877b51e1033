"""Latent cache: samples encoded once by the frozen networks, several variants of each picture.

A cache is a folder of ``.npy`` arrays (half precision, read by memory map) and ``cache.json``. Its
fingerprint covers everything that shapes its content; a cache of other settings is refused.
:mod:`pbe.training.cache_builder` makes it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pbe.config import Config, to_dict
from pbe.data.datamodule import CountingLoader
from pbe.data.randomness import permutation
from pbe.data.shards import shard_state
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.autoencoder import Posterior
from pbe.training.data import TimedLoader, TrainingData
from pbe.training.encoding import EncodedBatch

ARRAYS = ("image_mean", "image_std", "masked_mean", "masked_std", "keep_mask", "valid", "features")
META_NAME = "cache.json"


def arrays_of(batch: EncodedBatch) -> dict[str, Tensor]:
    """Return what is stored of a batch, by the names of :data:`ARRAYS`."""
    fields = (*batch.image, *batch.masked, batch.keep_mask, batch.valid, batch.features)
    return dict(zip(ARRAYS, fields, strict=True))


def fingerprint(config: Config, model: LatentDiffusion) -> str:
    """Return a hash of the data settings, the frozen weights, the tower's input and the precision.

    Shards count by the names and sizes of their files, remote ones by the hashes of their indexes.
    """
    data = to_dict(config.data)
    for irrelevant in ("batch_size", "num_workers", "max_bad_share", "verify", "remote_cache"):
        data.pop(irrelevant)
    # Newer settings count where they change something, so that older caches stay good.
    for section, name, neutral in ((data, "boxes", "one"), (data["sample"], "antialias_above", 1.0)):
        if section[name] == neutral:
            section.pop(name)
    settings = {"data": data, "seed": config.seed, "variants": config.cache.variants}
    settings["halved"] = halved(config)
    encoder = config.model.exemplar_encoder
    features = [encoder.tower, encoder.tokens, encoder.pooled_stages]
    if encoder.tokens == "all" and encoder.token_grid:
        features.append(encoder.token_grid)
    settings["exemplar"] = [*features, encoder.image_size, encoder.mean, encoder.std]
    settings["shards"] = [_shard_state(config.data.train_shards), _shard_state(config.data.validation_shards)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    autoencoder = model.autoencoder
    encoding = (autoencoder.encoder, autoencoder.quant_conv, autoencoder.patch_encoder)
    for module in (*encoding, model.exemplar_encoder.tower):
        for name, value in sorted(module.state_dict().items()) if module is not None else []:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def halved(config: Config) -> bool:
    """Say whether the frozen networks run in bfloat16."""
    return "bf16" in config.trainer.precision


def _shard_state(pattern: str) -> list[tuple[str, int | str]]:
    return shard_state(pattern) if pattern else []


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the description of a finished cache.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return dict(json.loads((folder / META_NAME).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{folder}' is not a latent cache ({error}); delete it to have it built again"
        ) from error


class CachedSamples(Dataset[tuple[int, int]]):
    """Cached samples by global counter; epoch and position follow from the index.

    Args:
        folder: of one stream.
        seed: of the run; keys the order of each epoch.
        shuffled: validation keeps the order of the cache.
    """

    def __init__(self, folder: Path, seed: int, *, shuffled: bool) -> None:
        self.meta = read_meta(folder)
        self.seed, self.shuffled = seed, shuffled
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Return the number of cached samples."""
        return int(self.meta["count"])

    def _rows(self, indices: list[int]) -> np.ndarray:
        if not self.shuffled:
            return np.asarray(indices) % len(self)
        rows = []
        for index in indices:
            epoch, position = divmod(index, len(self))
            if self._order[0] != epoch:
                self._order = (epoch, permutation(len(self), self.seed, "cache", "order", epoch))
            rows.append(int(self._order[1][position]))
        return np.asarray(rows)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return (global counter, row); the rows of a batch are read together by :meth:`batch`."""
        return int(index), int(self._rows([int(index)])[0])

    def batch(self, items: list[tuple[int, int]]) -> EncodedBatch:
        """Read the rows of a batch as float32 tensors."""
        counters, rows = zip(*items, strict=True)
        picked = [torch.from_numpy(self.arrays[name][list(rows)].astype(np.float32)) for name in ARRAYS]
        mean, std, masked_mean, masked_std, keep, valid, features = picked
        index = torch.tensor(counters, dtype=torch.int64)
        return EncodedBatch(
            Posterior(mean, std), Posterior(masked_mean, masked_std), keep, valid, features, index
        )


class CachedLoader(TimedLoader):
    """Batches out of a cache, which holds nothing that could be skipped."""

    def _count(self, batch: Any) -> None:
        """Count nothing."""


class CachedDataModule(TrainingData):
    """Training and validation batches out of a latent cache, as :class:`EncodedBatch`.

    Args:
        config: the experiment; ``cache.folder`` must have been built.
    """

    loader_type = CachedLoader

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.folder = Path(config.cache.folder)

    def samples(self, stream: str) -> CachedSamples:
        """Return the cached samples of a stream; training's are shuffled anew every epoch."""
        return CachedSamples(self.folder / stream, self.seed, shuffled=stream == "train")

    def workers(self) -> int:
        """Return 0: reading rows of a memory map is not worth a process."""
        return 0

    def _loader(self, stream: str) -> CountingLoader:
        loader = super()._loader(stream)
        assert isinstance(loader.dataset, CachedSamples)
        loader.collate_fn = loader.dataset.batch
        return loader
