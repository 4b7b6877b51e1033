"""Tiny latent caches, shared by the tests of building and of reading them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pbe.training.latent_cache.builder as builder_module
from pbe.config import Config
from pbe.data.datamodule import TrainingData
from pbe.data.dataset import collate
from pbe.models import LatentDiffusion
from pbe.training.setup import build_model
from pbe.training.tasks.encoding import EncodedBatch, encode_batch
from tests.training.tiny import tiny_config

# 8 images by 5: two shards of one batch each for each of three variants, and two of the validation
PICTURES, VARIANTS, BATCH, SHARDS = 8, 3, 5, 8
FIELDS = ("image.mean", "image.std", "masked.mean", "masked.std", "keep_mask", "valid", "features")


def settings(folder: Path, variants: int = VARIANTS) -> list[str]:
    """Return the overrides of a cache in a folder."""
    sizes = [f"cache.batch_size={BATCH}", f"cache.shard_samples={BATCH}"]
    return [f"cache.folder={folder}", f"cache.variants={variants}", *sizes]


def prepare(
    shards: Path, autoencoder: str, folder: Path, *overrides: str, variants: int = VARIANTS
) -> tuple[LatentDiffusion, Config]:
    """Return a model, and a configuration whose cache is to lie in a folder."""
    changes = [autoencoder, *settings(folder, variants), *overrides]
    return build_model(tiny_config(shards, folder / "run", *changes))


def tensors(batch: EncodedBatch) -> dict[str, torch.Tensor]:
    """Return what a batch holds by name."""
    flat = (*batch.image, *batch.masked, batch.keep_mask, batch.valid, batch.features)
    return dict(zip(FIELDS, flat, strict=True))


def online(model: LatentDiffusion, config: Config, indices: list[int], stream: str) -> EncodedBatch:
    """Encode samples of a stream, all in one batch."""
    dataset = TrainingData(config).dataset(stream)
    return encode_batch(model, collate([dataset[index] for index in indices]))


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a cache."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "run" not in path.parts
    }


class Encoder:
    """Counts the batches that are encoded, and does something before one of them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at: int = 0, action: Callable[[], None] = int
    ) -> None:
        self.calls = 0
        monkeypatch.setattr(builder_module, "encode_batch", self)
        self.at, self.action = at, action

    def __call__(self, *args: Any) -> EncodedBatch:
        self.calls += 1
        if self.calls == self.at:
            self.action()
        return encode_batch(*args)


def full() -> None:
    """Stand for a disk that is full."""
    raise OSError(errno.ENOSPC, "No space left on device")
