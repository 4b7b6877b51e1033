"""The index of shards: where each picture lies, how large it is, and its boxes, without reading the shards.

A folder of packed shards holds ``shards.json``, which names every shard with its counts, and beside each tar
an uncompressed ``.index.npz``. Opening a data set reads ``shards.json`` alone. A row is then read from the
index file with a few small reads, so that nothing of it is kept in memory: a thousand shards cost every
worker a few megabytes, and the kernel's page cache is what the workers share. Shards without an index are
indexed by the headers of their tars.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pbe.errors import UserError

MANIFEST_NAME = "shards.json"
MANIFEST_FORMAT, MANIFEST_VERSION = "pbe-shards", 1
PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
BLOCK = tarfile.BLOCKSIZE
HASH_BYTES = 16
OPEN_FILES = 128  # a process may often open 1024
LOCAL_HEADER, NAME_LENGTHS = 30, struct.Struct("<26x2H")
COLUMNS = (
    "picture_offset", "picture_size", "json_offset", "json_size", "width", "height", "key_bytes", "key_end",
    "box_end", "boxes", "picture_hash",
)  # fmt: skip


class DamagedIndexError(Exception):
    """An index file is not what it should be."""


@dataclass(frozen=True)
class PictureRow:
    """Everything about a picture but its pixels.

    Attributes:
        key: the name of its members.
        picture: offset and size in bytes of the encoded picture in its tar.
        annotation: the same of its JSON.
        frame: width and height in pixels; None where only the JSON knows.
        boxes: float64 ``n 4``, x1 y1 x2 y2 in pixels; None where only the JSON knows.
        digest: BLAKE2b of the encoded picture, 16 bytes; empty where unknown.
    """

    key: str
    picture: tuple[int, int]
    annotation: tuple[int, int]
    frame: tuple[int, int] | None = None
    boxes: np.ndarray | None = None
    digest: bytes = b""


class Files(Protocol):
    """Reads pieces of files."""

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return exactly ``size`` bytes from ``offset`` on; OSError where that cannot be done."""


class LocalFiles:
    """Reads pieces of local files and keeps those last used open, in each process its own."""

    def __init__(self, limit: int = OPEN_FILES) -> None:
        self._limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when sent to another process."""
        return {"_limit": self._limit, "_open": OrderedDict(), "_process": -1}

    def _descriptor(self, path: str) -> int:
        if self._process != os.getpid():  # a forked worker opens its own files
            self._open, self._process = OrderedDict(), os.getpid()
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
            if len(self._open) > self._limit:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return self._open[path]

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return exactly ``size`` bytes from ``offset`` on.

        Raises:
            OSError: the file is missing, or shorter than that.
        """
        data = os.pread(self._descriptor(path), size, offset)
        if len(data) != size:
            raise OSError(f"'{path}' was cut short while in use")
        return data


class Rows(Protocol):
    """The pictures of one shard, in the tar's order."""

    def row(self, number: int) -> PictureRow:
        """Return a picture's row."""

    def box_ends(self) -> np.ndarray:
        """Return for each picture the number of boxes of the shard up to and with its own, int64."""


def read_members(path: Path) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Read a tar's headers and return, by key, the places of each picture and of its JSON.

    Raises:
        UserError: the tar is truncated or foreign, or a key is double or lacks its partner.
    """
    pictures: dict[str, tuple[int, int]] = {}
    annotations: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            end = 0
            for member in tar:
                place = (member.offset_data, member.size)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                key, extension = os.path.splitext(member.name)
                picture = extension.lower() in PICTURE_EXTENSIONS
                if not picture and extension != ".json":
                    continue
                found = pictures if picture else annotations
                if key in found:
                    raise UserError(f"'{path}' holds '{key}' twice; write the shard again with unique keys")
                found[key] = place
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"'{path}' is not a tar or is truncated ({error}); write the shard again") from error
    # A whole tar ends in blocks of zeros; one that was cut between two members does not.
    if path.stat().st_size < end + BLOCK:
        raise UserError(f"'{path}' is truncated (its end is missing); write the shard again")
    if set(pictures) != set(annotations):
        lonely = sorted(set(pictures) ^ set(annotations))[0]
        raise UserError(f"'{path}': '{lonely}' lacks its picture or its .json; write the shard again")
    return {key: (place, annotations[key]) for key, place in pictures.items()}


class HeaderRows:
    """Rows made by reading a tar's headers, packed into arrays that forked workers share.

    Args:
        path: of the tar.
        count_boxes: read every JSON too, so that :meth:`box_ends` can be asked for.
    """

    def __init__(self, path: Path, *, count_boxes: bool = False) -> None:
        members = read_members(path)
        keys = [key.encode() for key in members]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *(len(key) for key in keys)])
        self._places = np.array(list(members.values()), np.int64).reshape(-1, 4)
        self._box_ends = _count_boxes(path, self._places[:, 2:]) if count_boxes else None

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._places)

    def row(self, number: int) -> PictureRow:
        """Return a picture's row, without frame and boxes."""
        start, end = self._key_ends[number : number + 2]
        offset, size, json_offset, json_size = self._places[number].tolist()
        return PictureRow(self._keys[start:end].decode(), (offset, size), (json_offset, json_size))

    def box_ends(self) -> np.ndarray:
        """Return the running count of boxes, int64 ``n``; see :class:`Rows`."""
        assert self._box_ends is not None
        return self._box_ends


def _count_boxes(path: Path, places: np.ndarray) -> np.ndarray:
    counts = []
    files = LocalFiles()
    for offset, size in places.tolist():
        try:
            counts.append(len(json.loads(files.read(str(path), offset, size))["boxes"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            counts.append(1)  # so that the picture gets its turn, and is counted as what it is
    return np.cumsum(np.array(counts, np.int64))


Place = tuple[int, np.dtype[Any], tuple[int, ...]]


def _layout(data: bytes) -> dict[str, Place]:
    """Find the arrays of an uncompressed npz file: offset of the values, dtype and shape."""
    places: dict[str, Place] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"'{member.filename}' is compressed")
            start = member.header_offset + LOCAL_HEADER
            start += sum(NAME_LENGTHS.unpack_from(data, member.header_offset))
            header = io.BytesIO(data[start : start + 512])
            np.lib.format.read_magic(header)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
            if fortran or dtype.hasobject:
                raise ValueError(f"'{member.filename}' is no plain array")
            places[member.filename.removesuffix(".npy")] = (start + header.tell(), dtype, shape)
    return places


class IndexFile:
    """Rows read from an index file, a few bytes at a time.

    Args:
        path: of a local ``.index.npz``.
        pictures: number of rows that it must have.
        files: read from.
        digest: hexadecimal BLAKE2b that the file must have; None does not check.

    Raises:
        DamagedIndexError: it is no index file, or another than ``shards.json`` tells of.
        OSError: it cannot be read.
    """

    def __init__(self, path: str, pictures: int, files: Files, digest: str | None = None) -> None:
        data = Path(path).read_bytes()
        if digest is not None and hashlib.blake2b(data, digest_size=HASH_BYTES).hexdigest() != digest:
            raise DamagedIndexError(f"'{path}' is not the index that {MANIFEST_NAME} tells of")
        try:
            self._places = _layout(data)
            ends = [self._places[name] for name in ("key_end", "box_end", "picture_offset")]
            whole = all(
                offset + _bytes(dtype, shape) <= len(data) for offset, dtype, shape in self._places.values()
            )
            if (
                set(COLUMNS) - set(self._places)
                or not whole
                or any(shape != (pictures,) for _, _, shape in ends)
            ):
                raise ValueError("columns are missing or too short")
        except (zipfile.BadZipFile, ValueError, KeyError, struct.error) as error:
            raise DamagedIndexError(f"'{path}' is no index of {pictures} pictures ({error})") from error
        self._path, self._files, self._pictures = path, files, pictures

    def _read(self, name: str, start: int, end: int) -> np.ndarray:
        offset, dtype, shape = self._places[name]
        if not 0 <= start <= end <= shape[0]:
            raise DamagedIndexError(f"'{self._path}': '{name}' ends before {end}")
        item = _bytes(dtype, shape[1:])
        data = self._files.read(self._path, offset + start * item, (end - start) * item)
        return np.frombuffer(data, dtype).reshape(-1, *shape[1:])

    def _one(self, name: str, number: int) -> int:
        return int(self._read(name, number, number + 1)[0])

    def _span(self, name: str, number: int) -> tuple[int, int]:
        ends = self._read(name, max(number - 1, 0), number + 1).tolist()
        return (0, ends[0]) if number == 0 else (ends[0], ends[1])

    def row(self, number: int) -> PictureRow:
        """Return a picture's row.

        Raises:
            DamagedIndexError: where its numbers contradict each other.
            OSError: the index can no longer be read.
        """
        try:
            key = self._read("key_bytes", *self._span("key_end", number)).tobytes().decode()
        except UnicodeDecodeError as error:
            raise DamagedIndexError(f"'{self._path}': a key is not UTF-8") from error
        return PictureRow(
            key=key,
            picture=(self._one("picture_offset", number), self._one("picture_size", number)),
            annotation=(self._one("json_offset", number), self._one("json_size", number)),
            frame=(self._one("width", number), self._one("height", number)),
            boxes=self._read("boxes", *self._span("box_end", number)),
            digest=self._read("picture_hash", number, number + 1).tobytes(),
        )

    def box_ends(self) -> np.ndarray:
        """Return the running count of boxes, int64 ``n``; see :class:`Rows`."""
        return self._read("box_end", 0, self._pictures)


def _bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


@dataclass(frozen=True)
class IndexedShard:
    """What ``shards.json`` says of a shard; the paths lie beside it."""

    path: str
    pictures: int
    boxes: int
    index: str
    index_digest: str


def parse_manifest(text: bytes | str, source: str, place: Callable[[str], str]) -> list[IndexedShard]:
    """Read ``shards.json``.

    Args:
        text: its content.
        source: its path, for messages.
        place: makes the path of a file beside it from the name.

    Raises:
        UserError: it is damaged, of another kind, or of a version that is not known here.
    """
    again = "pack the shards again"
    try:
        loaded = json.loads(text)
        if loaded["format"] != MANIFEST_FORMAT:
            raise UserError(f"'{source}' is not the list of a data set's shards; {again}")
        if loaded["version"] != MANIFEST_VERSION:
            raise UserError(f"'{source}' is of version {loaded['version']}, not {MANIFEST_VERSION}; {again}")
        return [
            IndexedShard(
                path=place(shard["name"]),
                pictures=int(shard["pictures"]),
                boxes=int(shard["boxes"]),
                index=place(shard["index"]),
                index_digest=str(shard["index_blake2b"]),
            )
            for shard in loaded["shards"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{source}' is damaged ({type(error).__name__}: {error}); {again}") from error
