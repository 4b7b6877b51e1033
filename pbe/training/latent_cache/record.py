"""One variant of one sample as bytes: what is stored, how, and the tar of many of them.

A record is a structured scalar of fixed size: half precision for latents and features, a byte for each
element of the masks. It is an ``.npy`` member of an uncompressed tar, so that any WebDataset reader yields
it, and since all members are of one size, row ``i`` of a shard begins at ``start + i * stride``.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbe.config import Config
from pbe.data.shards.format import BLOCK, HASH_BYTES, digest, new_shard
from pbe.models import LatentDiffusion
from pbe.models.autoencoder import Posterior
from pbe.training.tasks.encoding import EncodedBatch

# Masks of whole pixels have quarters at the latents' size (the mean of four pixels): exact in this unit.
MASK_UNIT = 252
MASKS = ("keep_mask", "valid")
LATENTS = ("image_mean", "image_std", "masked_mean", "masked_std")


def record_of(config: Config, model: LatentDiffusion) -> np.dtype[Any]:
    """Return the type of a record: sizes follow from the model, which may be on the meta device."""
    size = config.data.image_size // model.autoencoder.downsampling
    side, device = config.model.exemplar_encoder.image_size, model.unet.conv_in.weight.device
    with torch.no_grad():
        features = model.exemplar_encoder.features(torch.zeros(1, 3, side, side, device=device))
    latents = (config.model.autoencoder.latent_channels, size, size)
    fields: list[tuple[str, str, tuple[int, ...]]] = [(name, "<f2", latents) for name in LATENTS]
    fields += [(name, "|u1", (1, size, size)) for name in MASKS]
    return np.dtype([*fields, ("features", "<f2", tuple(features.shape[1:]))])


def to_json(record: np.dtype[Any]) -> list[list[Any]]:
    """Describe a record's type: name, NumPy's code of the element, and shape of each field."""
    return [[name, code, list(shape)] for name, code, shape in record.descr]  # type: ignore[misc]


def from_json(fields: list[list[Any]]) -> np.dtype[Any]:
    """Return the type that :func:`to_json` described."""
    return np.dtype([(name, code, tuple(shape)) for name, code, shape in fields])


def to_records(batch: EncodedBatch, record: np.dtype[Any]) -> np.ndarray:
    """Return the records of a batch, ``(b,)``, rounded to what is stored."""
    latents = dict(zip(LATENTS, (*batch.image, *batch.masked), strict=True))
    records = np.empty(len(batch.keep_mask), record)
    for name, value in {**latents, "features": batch.features}.items():
        records[name] = value.to(torch.float16).cpu().numpy()
    for name in MASKS:
        records[name] = (getattr(batch, name) * MASK_UNIT).round().to(torch.uint8).cpu().numpy()
    return records


def from_records(records: np.ndarray, counters: Tensor, *, class_only: bool = False) -> EncodedBatch:
    """Return records ``(b,)`` as a batch of float32 tensors.

    Args:
        records: as :func:`to_records` made them.
        counters: ``(b,)`` int64 global counter of each sample.
        class_only: keep the first token, that of the class, and leave the others out.
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
    """Where the rows of a shard lie: all members of the tar are of one size.

    Args:
        record: the type of a row.

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
    """Write consecutive samples of one variant as a shard.

    The columns of its index are those of packed shards, as far as there is something to tell: ``key_bytes``
    and ``key_end``, ``row_offset`` and ``row_size`` (of the values), ``row_hash`` (BLAKE2b, ``n 16``); and of
    the whole: ``tar_size``, ``tar_hash`` and ``counts`` as JSON.

    Args:
        path: of the tar.
        records: ``(n,)``.
        variant: epoch of the stream that they belong to.
        first: position therein of the first one.
        counts: what was skipped or adjusted on the way.
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
