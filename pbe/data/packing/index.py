"""The index beside packed shards: what lies where, so that opening a data set reads one small file.

``shards.json`` names the shards with their sizes, counts and hashes; it is written last, so a folder that
has one is complete. ``NAME.index.npz`` holds, for the pictures of one shard in their order, offsets, sizes,
keys, boxes and hashes; it is read when the shard is first used. docs/data.md lists every field.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pbe.data.shards.index import HASH_BYTES, MANIFEST_FORMAT, MANIFEST_NAME, MANIFEST_VERSION
from pbe.errors import UserError
from pbe.files import atomic_write

EXTENSIONS = ("jpg", "png", "webp")


def digest(data: bytes) -> bytes:
    """Return the 16-byte BLAKE2b hash of ``data``."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears under its name only when it is complete and on the disk."""
    atomic_write(path, data, sync=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file that packing keeps for itself."""
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        problem = "no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
    raise UserError(f"'{path}' is damaged ({problem}); start anew with --overwrite")


@dataclass(frozen=True)
class ShardTable:
    """The pictures of one shard, ``n``, and their boxes, ``m``; ends count what lies before them too.

    Attributes:
        picture_offset: int64 ``n``, where the encoded picture starts in the tar.
        picture_size: int64 ``n``, bytes.
        json_offset: int64 ``n``.
        json_size: int64 ``n``.
        width: int32 ``n``, pixels as displayed.
        height: int32 ``n``.
        extension: uint8 ``n``, a position in :data:`EXTENSIONS`.
        key_bytes: uint8, UTF-8 keys one after another.
        key_end: int64 ``n``.
        box_end: int64 ``n``.
        boxes: float64 ``m 4``, x1 y1 x2 y2 in pixels, x2 and y2 exclusive.
        labels: int32 ``m``, positions in the labels of ``shards.json``.
        picture_hash: uint8 ``n 16``, of the encoded picture.
        perceptual_hash: uint64 ``n``; 0 where there is none.
        has_mask: bool ``m``, the JSON member holds the box's mask.
    """

    picture_offset: np.ndarray
    picture_size: np.ndarray
    json_offset: np.ndarray
    json_size: np.ndarray
    width: np.ndarray
    height: np.ndarray
    extension: np.ndarray
    key_bytes: np.ndarray
    key_end: np.ndarray
    box_end: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    picture_hash: np.ndarray
    perceptual_hash: np.ndarray
    has_mask: np.ndarray

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.width)

    def key(self, position: int) -> str:
        """Return the key of the picture at ``position``."""
        start = self.key_end[position - 1] if position else 0
        return self.key_bytes[start : self.key_end[position]].tobytes().decode()

    def box_rows(self, position: int) -> slice:
        """Return the rows of ``boxes`` and ``labels`` that belong to the picture at ``position``."""
        return slice(int(self.box_end[position - 1]) if position else 0, int(self.box_end[position]))

    def to_bytes(self) -> bytes:
        """Return the file's bytes, the same for the same table."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **{name: getattr(self, name) for name in TABLE_DTYPES})
        return buffer.getvalue()


TABLE_DTYPES = {
    "picture_offset": np.int64,
    "picture_size": np.int64,
    "json_offset": np.int64,
    "json_size": np.int64,
    "width": np.int32,
    "height": np.int32,
    "extension": np.uint8,
    "key_bytes": np.uint8,
    "key_end": np.int64,
    "box_end": np.int64,
    "boxes": np.float64,
    "labels": np.int32,
    "picture_hash": np.uint8,
    "perceptual_hash": np.uint64,
    "has_mask": np.bool_,
}


def load_index(source: Path | bytes) -> ShardTable:
    """Read the index of one shard from its file or from the file's bytes."""
    name = "the bytes given" if isinstance(source, bytes) else f"'{source}'"
    try:
        with np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False) as file:
            arrays = {field.name: file[field.name] for field in fields(ShardTable)}
    except Exception as error:  # zipfile and numpy raise whatever their parsers stumble over
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: no whole index of a shard ({what}); pack the shards again") from error
    return ShardTable(**arrays)


@dataclass(frozen=True)
class IndexEntry:
    """One picture on its way into a table; see :class:`ShardTable`."""

    key: str
    picture: tuple[int, int]
    annotation: tuple[int, int]
    size: tuple[int, int]
    extension: str
    boxes: Sequence[Sequence[float]]
    labels: Sequence[int]
    masks: Sequence[bool]
    picture_hash: bytes
    perceptual_hash: int


def make_table(entries: Sequence[IndexEntry]) -> ShardTable:
    """Return the table of some pictures."""
    keys = [entry.key.encode() for entry in entries]
    columns: dict[str, Any] = {
        "picture_offset": [entry.picture[0] for entry in entries],
        "picture_size": [entry.picture[1] for entry in entries],
        "json_offset": [entry.annotation[0] for entry in entries],
        "json_size": [entry.annotation[1] for entry in entries],
        "width": [entry.size[0] for entry in entries],
        "height": [entry.size[1] for entry in entries],
        "extension": [EXTENSIONS.index(entry.extension) for entry in entries],
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
        "key_end": np.cumsum([len(key) for key in keys]),
        "box_end": np.cumsum([len(entry.boxes) for entry in entries]),
        "boxes": np.array([box for entry in entries for box in entry.boxes], np.float64).reshape(-1, 4),
        "labels": [label for entry in entries for label in entry.labels],
        "picture_hash": np.frombuffer(b"".join(entry.picture_hash for entry in entries), np.uint8).reshape(
            -1, 16
        ),
        "perceptual_hash": [entry.perceptual_hash for entry in entries],
        "has_mask": [mask for entry in entries for mask in entry.masks],
    }
    return ShardTable(**{name: np.asarray(columns[name], kind) for name, kind in TABLE_DTYPES.items()})


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return what ``shards.json`` of a folder holds, or None where there is none."""
    path = folder / MANIFEST_NAME
    try:
        summary = json.loads(path.read_bytes())
        known = (summary["format"], summary["version"]) == (MANIFEST_FORMAT, MANIFEST_VERSION)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged ({error}); pack the shards again") from error
    if not known:
        raise UserError(f"'{path}' is of another version of this project; pack the shards again")
    return dict(summary)
