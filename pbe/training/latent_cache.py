"""Latent cache: samples encoded once by the frozen networks, several variants of each picture.

A cache is a folder of ``.npy`` arrays (half precision, read by memory map) and ``cache.json``. Its
fingerprint covers everything that shapes its content; a cache of other settings is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from pbe.config import Config, to_dict
from pbe.data.datamodule import CounterSampler, CountingLoader, ExemplarDataModule
from pbe.data.randomness import permutation
from pbe.data.shards import shard_state
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.autoencoder import Posterior
from pbe.training.encoding import EncodedBatch, encode_batch

ARRAYS = ("image_mean", "image_std", "masked_mean", "masked_std", "keep_mask", "valid", "features")
META_NAME = "cache.json"


def _arrays(batch: EncodedBatch) -> dict[str, Tensor]:
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
    settings["halved"] = _halved(config)
    encoder = config.model.exemplar_encoder
    features = [encoder.tower, encoder.tokens, encoder.pooled_stages]
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


def _halved(config: Config) -> bool:
    """Say whether the frozen networks run in bfloat16."""
    return "bf16" in config.trainer.precision


def _shard_state(pattern: str) -> list[tuple[str, int | str]]:
    return shard_state(pattern) if pattern else []


def ensure_cache(config: Config, model: LatentDiffusion) -> Path:
    """Build the cache of both streams unless a finished one with the same fingerprint is there.

    Args:
        config: ``cache.folder`` says where, ``cache.variants`` how many samples of each training picture.
        model: with its frozen parts loaded.

    Raises:
        UserError: the folder holds a cache made with other settings or weights.
    """
    folder, wanted = Path(config.cache.folder), fingerprint(config, model)
    for stream in ("train", "validation"):
        if stream == "validation" and not config.data.validation_shards:
            continue
        if (folder / stream / META_NAME).is_file():
            if _read_meta(folder / stream)["fingerprint"] != wanted:
                raise UserError(
                    f"the latent cache '{folder}' was made with other data settings or weights; "
                    "delete it or name another cache.folder"
                )
            continue
        _build(config, model, stream, folder / stream, wanted)
    return folder


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / META_NAME).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{folder}' is not a latent cache ({error}); delete it to have it built again"
        ) from error


@torch.no_grad()
def _build(config: Config, model: LatentDiffusion, stream: str, folder: Path, mark: str) -> None:
    """Encode every sample into a temporary folder, which gets its name when it is complete."""
    dataset = ExemplarDataModule(config.data, config.seed).dataset(stream)
    epochs = config.cache.variants if stream == "train" else 1
    sampler = CounterSampler(dataset, config.cache.batch_size, 0, 1, drop_last=False)
    loader = CountingLoader(sampler, stream, config.data.max_bad_share, False, config.data.num_workers)
    count = len(dataset) * epochs
    for stale in folder.parent.glob(f".{folder.name}.*"):  # of a build that was killed
        shutil.rmtree(stale)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        batches = tqdm(
            (batch for _ in range(epochs) for batch in loader),
            desc=f"caching {stream}", total=epochs * len(loader), disable=not config.trainer.progress,
        )  # fmt: skip
        _encode_into(temporary, model, batches, count, halved=_halved(config))
        meta = {"fingerprint": mark, "count": count, "pictures": len(dataset), "stream": stream}
        (temporary / META_NAME).write_text(json.dumps(meta, indent=2))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encode_into(
    folder: Path, model: LatentDiffusion, batches: Iterable[dict[str, Any]], count: int, *, halved: bool
) -> None:
    device = model.unet.conv_in.weight.device
    files: dict[str, np.memmap[Any, Any]] = {}
    start = 0
    for batch in batches:
        on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=halved):
            arrays = _arrays(encode_batch(model, on_device))
        for name, value in arrays.items():
            block = value.to(torch.float16).cpu().numpy()
            if name not in files:
                shape = (count, *block.shape[1:])
                files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
            files[name][start : start + len(block)] = block
        start += len(batch["sample_index"])
    for array in files.values():
        array.flush()


class CachedSamples(Dataset[tuple[int, int]]):
    """Cached samples by global counter; epoch and position follow from the index.

    Args:
        folder: of one stream.
        seed: of the run; keys the order of each epoch.
        shuffled: validation keeps the order of the cache.
    """

    def __init__(self, folder: Path, seed: int, *, shuffled: bool) -> None:
        self.meta = _read_meta(folder)
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


class CachedLoader(CountingLoader):
    """Batches out of a cache, which holds nothing that could be skipped."""

    def _count(self, batch: Any) -> None:
        """Count nothing."""


class CachedDataModule(ExemplarDataModule):
    """Training and validation batches out of a latent cache, as :class:`EncodedBatch`.

    Args:
        config: the experiment; ``cache.folder`` must have been built by :func:`ensure_cache`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config.data, config.seed)
        self.folder = Path(config.cache.folder)

    def _loader(self, stream: str) -> CountingLoader:
        train = stream == "train"
        dataset = CachedSamples(self.folder / stream, self.seed, shuffled=train)
        trainer, size = self.trainer, self.config.batch_size
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler = CounterSampler(dataset, size, rank, world, drop_last=train and len(dataset) >= size * world)
        loader = CachedLoader(sampler, stream, self.config.max_bad_share, not train, num_workers=0)
        loader.collate_fn = dataset.batch
        self._loaders[stream] = loader
        return loader
