"""Writes an index beside shards, by hand from the format's description."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from pbe.data.shards.index import read_members


def blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def index_bytes(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    return buffer.getvalue()


def shard_columns(path: Path) -> dict[str, Any]:
    """Return the columns of a tar's index."""
    tar, members = path.read_bytes(), read_members(path)
    keys = [key.encode() for key in members]
    places = np.array(list(members.values()), np.int64).reshape(-1, 4)
    notes = [json.loads(tar[start : start + size]) for start, size in places[:, 2:].tolist()]
    hashes = [blake(tar[start : start + size]) for start, size in places[:, :2].tolist()]
    boxes = [box["xyxy"] for note in notes for box in note["boxes"]]
    return {
        "picture_offset": places[:, 0],
        "picture_size": places[:, 1],
        "json_offset": places[:, 2],
        "json_size": places[:, 3],
        "width": np.array([note["width"] for note in notes], np.int32),
        "height": np.array([note["height"] for note in notes], np.int32),
        "extension": np.zeros(len(keys), np.uint8),
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
        "key_end": np.cumsum([len(key) for key in keys]),
        "box_end": np.cumsum([len(note["boxes"]) for note in notes]),
        "boxes": np.array(boxes, np.float64).reshape(-1, 4),
        "labels": np.zeros(len(boxes), np.int32),
        "picture_hash": np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16),
        "perceptual_hash": np.zeros(len(keys), np.uint64),
        "has_mask": np.zeros(len(boxes), bool),
    }


def index_folder(folder: Path) -> Path:
    """Write an index of every tar of a folder, and ``shards.json``; return the folder."""
    shards = []
    for path in sorted(folder.glob("*.tar")):
        columns = shard_columns(path)
        data = index_bytes(columns)
        name = f"{path.stem}.index.npz"
        (folder / name).write_bytes(data)
        tar = path.read_bytes()
        shards.append(
            {
                "name": path.name,
                "bytes": len(tar),
                "pictures": len(columns["width"]),
                "boxes": len(columns["boxes"]),
                "blake2b": blake(tar).hex(),
                "index": name,
                "index_bytes": len(data),
                "index_blake2b": blake(data).hex(),
            }
        )
    manifest = {
        "format": "pbe-shards",
        "version": 1,
        "fingerprint": "",
        "pictures": sum(shard["pictures"] for shard in shards),
        "boxes": sum(shard["boxes"] for shard in shards),
        "labels": [""],
        "shards": shards,
    }
    (folder / "shards.json").write_text(json.dumps(manifest))
    return folder
