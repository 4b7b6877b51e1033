"""The format of shards: a tar, an index beside it, and the list of all shards.

Packed images and latent caches are both shards. The bytes of a tar follow from its content alone.
``NAME.index.npz`` is uncompressed and says where things lie in ``NAME.tar``; what its arrays are called
depends on what is stored. ``shards.json`` lists the shards with their sizes and hashes and is written last,
so a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pbe.errors import UserError
from pbe.files import HashingFile, atomic_file, atomic_write

MANIFEST_NAME = "shards.json"
MANIFEST_FORMAT, MANIFEST_VERSION = "pbe-shards", 1  # of packed images
HASH_BYTES = 16
BLOCK = tarfile.BLOCKSIZE
PACK_AGAIN = "pack the shards again"


class DamagedIndexError(Exception):
    """An index file is not what it should be."""


def digest(data: bytes | memoryview) -> bytes:
    """Return the 16-byte BLAKE2b hash of ``data``."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def index_path(tar: Path) -> Path:
    """Return the path of a shard's index."""
    return tar.with_suffix(".index.npz")


def index_bytes(columns: Mapping[str, np.ndarray]) -> bytes:
    """Return the content of an index file, the same for the same columns."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **columns)
    return buffer.getvalue()


def read_index(source: Path | bytes, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read whole columns of an index, from its file or its bytes; DamagedIndexError where that fails."""
    name = "the bytes given" if isinstance(source, bytes) else f"'{source}'"
    try:
        with np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False) as file:
            return {column: file[column] for column in names}
    except Exception as error:  # zipfile and numpy raise whatever their parsers stumble over
        what = " ".join(str(error).split()) or type(error).__name__
        raise DamagedIndexError(f"{name} is not a whole index of a shard ({what})") from error


def index_entry(tar: Path, index: bytes) -> dict[str, Any]:
    """Return what ``shards.json`` says of the index of a shard."""
    name, hashed = index_path(tar).name, digest(index).hex()
    return {"index": name, "index_bytes": len(index), "index_blake2b": hashed}


class ShardWriter:
    """Writes the tar of a shard, with a fixed owner and time, and the index beside it.

    The tar will have ``path`` and is written to ``file``. ``names`` is :mod:`tarfile`'s format; PAX takes
    names of any length.
    """

    def __init__(self, path: Path, file: BinaryIO, names: int = tarfile.USTAR_FORMAT) -> None:
        self.path = path
        self._file = HashingFile(file, hashlib.blake2b(digest_size=HASH_BYTES))
        self._tar = tarfile.TarFile(mode="w", fileobj=self._file, format=names)  # type: ignore[arg-type]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added so far."""
        return self._tar.offset == 0

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Write a member; returns the offset and the size of its data."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o644
        member.uname = member.gname = "pbe"
        self._tar.addfile(member, io.BytesIO(data))
        return self._tar.offset - -(-len(data) // BLOCK) * BLOCK, len(data)

    def end(self) -> tuple[int, bytes]:
        """End the tar, if that has not been done; returns its size and its hash."""
        self._tar.close()
        return self._file.size, self._file.hash.digest()

    def write_index(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """End the tar and write its index; returns what ``shards.json`` says of both."""
        size, tar_hash = self.end()
        index = index_bytes(columns)
        atomic_write(index_path(self.path), index, sync=True)
        entry = {"name": self.path.name, "bytes": size, "blake2b": tar_hash.hex()}
        return entry | index_entry(self.path, index)


class _EmptyShard(Exception):  # noqa: N818
    """A shard to which nothing was added."""


@contextmanager
def new_shard(path: Path, names: int = tarfile.USTAR_FORMAT) -> Iterator[ShardWriter]:
    """Write a shard: its tar appears, unless empty, when the ``with`` block ends well, after the index."""
    with suppress(_EmptyShard), atomic_file(path, sync=True) as file:
        writer = ShardWriter(path, file, names)
        yield writer
        if writer.is_empty:
            raise _EmptyShard
        writer.end()


@contextmanager
def manifest_errors(source: str | Path, remedy: str) -> Iterator[None]:
    """Turn what goes wrong while a ``shards.json`` is parsed into a one-line ``UserError``."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"'{source}' is damaged ({type(error).__name__}: {error}); {remedy}") from error


def load_manifest(
    text: bytes | str,
    source: str | Path,
    kind: str = MANIFEST_FORMAT,
    version: int = MANIFEST_VERSION,
    remedy: str = PACK_AGAIN,
) -> dict[str, Any]:
    """Return the content of a ``shards.json``, checked for its format (``kind``) and version.

    ``source`` is its path or URL, for messages, and ``remedy`` what users are told to do.
    """
    with manifest_errors(source, remedy):
        content = json.loads(text)
        if content["format"] != kind:
            raise UserError(f"'{source}' is not the list of shards of the format '{kind}'; {remedy}")
        if content["version"] != version:
            raise UserError(f"'{source}' is of version {content['version']}, not {version}; {remedy}")
        return dict(content)
