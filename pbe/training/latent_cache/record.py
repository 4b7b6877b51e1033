"""One variant of one sample as bytes: what is stored, how, and the tar of many of them.

A record is a structured scalar of fixed size: half precision for latents and features, a byte for each
element of the masks. It is an ``.npy`` member of an uncompressed tar, so that any WebDataset reader yields
it, and since all members are of one size, row ``i`` of a shard begins at ``start + i * stride``.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbe.config import Config
from pbe.models import LatentDiffusion
from pbe.models.codec import Posterior
from pbe.training.tasks.encoding import EncodedBatch

BLOCK = tarfile.BLOCKSIZE
DIGEST_BYTES = 16
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


@dataclass(frozen=True)
class Layout:
    """Where the rows of a shard lie.

    Attributes:
        record: the type of a row.
    """

    record: np.dtype[Any]

    @cached_property
    def header(self) -> bytes:
        """What stands before the values in every member, by NumPy's file format."""
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((), self.record), allow_pickle=False)
        return buffer.getvalue()[: -self.record.itemsize]

    @cached_property
    def start(self) -> int:
        """Offset of the first row's values."""
        return BLOCK + len(self.header)

    @cached_property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return BLOCK + -(-(len(self.header) + self.record.itemsize) // BLOCK) * BLOCK

    def offset(self, row: int) -> int:
        """Return where the values of a row begin."""
        return self.start + row * self.stride

    def tar_size(self, rows: int) -> int:
        """Return the bytes of a shard's tar; it ends with two empty blocks, filled up to twenty."""
        return -(-(rows * self.stride + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def tar_bytes(records: np.ndarray, variant: int, first: int) -> bytes:
    """Return the tar of consecutive samples of one variant.

    Args:
        records: ``(n,)``.
        variant: epoch of the stream that they belong to.
        first: position therein of the first one.
    """
    layout, count = Layout(records.dtype), len(records)
    tar = np.zeros(layout.tar_size(count), np.uint8)
    body = tar[: count * layout.stride].reshape(count, layout.stride)
    for row, members in enumerate(body):
        members[:BLOCK] = np.frombuffer(_member(variant, first + row, layout), np.uint8)
    body[:, BLOCK : layout.start] = np.frombuffer(layout.header, np.uint8)
    values = np.ascontiguousarray(records).view(np.uint8).reshape(count, records.dtype.itemsize)
    body[:, layout.start : layout.start + records.dtype.itemsize] = values
    return tar.tobytes()


def _key(variant: int, position: int) -> str:
    return f"{variant:03d}-{position:09d}"


def _member(variant: int, position: int, layout: Layout) -> bytes:
    # Fixed owner and time: same data, same bytes.
    member = tarfile.TarInfo(f"{_key(variant, position)}.npy")
    member.size, member.mode = len(layout.header) + layout.record.itemsize, 0o644
    member.uname = member.gname = "pbe"
    return member.tobuf(tarfile.USTAR_FORMAT)


def digest(data: bytes | memoryview) -> bytes:
    """Return the 16-byte BLAKE2b hash of ``data``."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def index_bytes(
    records: np.ndarray, variant: int, first: int, tar: bytes, counts: dict[str, int] | None = None
) -> bytes:
    """Return the ``.index.npz`` of a shard, uncompressed: the same for the same shard.

    Its columns are those of the data's shards, as far as there is something to tell: ``key_bytes`` and
    ``key_end``, ``row_offset`` and ``row_size`` (of the values), ``row_hash`` (BLAKE2b, ``n 16``); and of the
    whole: ``tar_size``, ``tar_hash`` and ``counts``, the JSON of what was skipped or adjusted on the way.
    """
    layout, count = Layout(records.dtype), len(records)
    keys = [_key(variant, first + row).encode() for row in range(count)]
    hashes = b"".join(digest(row.tobytes()) for row in records)
    columns: dict[str, np.ndarray] = {
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
        "key_end": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "row_offset": layout.start + layout.stride * np.arange(count, dtype=np.int64),
        "row_size": np.full(count, records.dtype.itemsize, np.int64),
        "row_hash": np.frombuffer(hashes, np.uint8).reshape(count, DIGEST_BYTES),
        "tar_size": np.array(len(tar), np.int64),
        "tar_hash": np.frombuffer(digest(tar), np.uint8),
        "counts": np.frombuffer(json.dumps(counts or {}, sort_keys=True).encode(), np.uint8),
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **columns)
    return buffer.getvalue()
