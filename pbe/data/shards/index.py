"""The index of shards: where each image lies, how large it is, and its boxes, without reading the shards.

A folder of packed shards holds ``shards.json``, which names every shard with its counts, and beside each tar
an uncompressed ``.index.npz``. Opening a data set reads ``shards.json`` alone. A row is then read from the
index file with a few small reads, so that nothing of it is kept in memory: a thousand shards cost every
worker a few megabytes, and the kernel's page cache is what the workers share.

Shards without an index are indexed by the headers of their tars, whoever wrote them. Members pair by their
name without its ending, ``a.v1.jpg`` with ``a.v1.json``, wherever they stand. ``./`` in front is left out,
and so are folders, macOS's ``._`` companions and members of other kinds. What belongs to nothing, or cannot
be told apart, is an error that names it: no image is left out in silence.
"""

from __future__ import annotations

import io
import json
import math
import os
import posixpath
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pbe.data.shards.format import (
    BLOCK,
    HASH_BYTES,
    MANIFEST_NAME,
    DamagedIndexError,
    digest as digest_of,
)
from pbe.errors import UserError

OPEN_FILES = 128  # a process may often open 1024
LOCAL_HEADER, NAME_LENGTHS = 30, struct.Struct("<26x2H")
# Of the arrays that are read: the type, and what a row of it holds.
COLUMNS: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
    "picture_offset": (np.int64, ()),
    "picture_size": (np.int64, ()),
    "json_offset": (np.int64, ()),
    "json_size": (np.int64, ()),
    "width": (np.int32, ()),
    "height": (np.int32, ()),
    "key_bytes": (np.uint8, ()),
    "key_end": (np.int64, ()),
    "box_end": (np.int64, ()),
    "boxes": (np.float64, (4,)),
    "picture_hash": (np.uint8, (HASH_BYTES,)),
}
ENDS = {"key_end": "key_bytes", "box_end": "boxes"}  # of an array, in rows of another
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
FOREIGN_EXTENSIONS = (".bmp", ".gif", ".tif", ".tiff", ".jfif", ".avif", ".heic", ".jp2", ".ppm", ".tga")
COMPANION = "._"
MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip", b"Rar!": "rar", b"7z\xbc\xaf": "7z",
}  # fmt: skip
Place = tuple[int, int]  # offset and size in bytes
Array = tuple[int, np.dtype[Any], tuple[int, ...]]  # of an index: offset of the values, dtype and shape


@dataclass(frozen=True)
class ImageRow:
    """Everything about an image but its pixels.

    Attributes:
        key: the name of its members.
        image: offset and size in bytes of the encoded image in its tar.
        annotation: the same of its JSON.
        frame: width and height in pixels; None where only the JSON knows.
        boxes: float64 ``n 4``, x1 y1 x2 y2 in pixels; None where only the JSON knows.
        digest: BLAKE2b of the encoded image, 16 bytes; empty where unknown.
    """

    key: str
    image: Place
    annotation: Place
    frame: tuple[int, int] | None = None
    boxes: np.ndarray | None = None
    digest: bytes = b""


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
        """Return exactly ``size`` bytes from ``offset`` on; OSError where they are not there."""
        file = self._descriptor(path)
        # A size that a damaged index made up would be allocated first.
        fits = offset >= 0 and 0 <= size <= os.fstat(file).st_size - offset
        data = os.pread(file, size, offset) if fits else b""
        if not fits or len(data) != size:
            raise OSError(f"'{path}' was cut short while in use")
        return data


class Member(NamedTuple):
    """A file in a tar: its name, what pairs it, the ending in small letters, its offset and size in bytes."""

    name: str
    key: str
    extension: str
    place: Place


def read_members(path: Path) -> dict[str, tuple[Place, Place]]:
    """Read a tar's headers and return, by key, the places of each image and of its JSON."""
    try:
        members = list(_files(path))
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(f"'{path}' {_why(path, error)}") from error
    images = _by_key(path, (member for member in members if member.extension in IMAGE_EXTENSIONS))
    annotations = _by_key(path, (member for member in members if member.extension == ".json"))
    whole = images.keys() & annotations.keys()
    lonely = [
        member
        for key, member in sorted({**images, **annotations}.items())
        if key not in whole and not _is_extra(key, whole)
    ]
    if lonely:
        raise UserError(f"'{path}': {_complaint(lonely, members)}; write the shard again")
    return {key: (member.place, annotations[key].place) for key, member in images.items() if key in whole}


def _files(path: Path) -> Iterator[Member]:
    """Yield what may be an image or a JSON, in the tar's order."""
    end = 0
    with tarfile.open(path, "r:") as tar:
        links: dict[str, tarfile.TarInfo] = {}
        for member in tar:
            end = max(end, tar.offset)
            name = _plain(member.name)
            if member.islnk():  # the same file once more: its bytes lie where the first one's do
                member = links.get(_plain(member.linkname), member)
            if not member.isreg() or posixpath.basename(name).startswith(COMPANION):
                continue
            links[name] = member
            key, extension = posixpath.splitext(name)
            if member.issparse() and extension.lower() in (*IMAGE_EXTENSIONS, ".json"):
                raise UserError(f"'{path}' holds '{name}' as a sparse file; write it again without --sparse")
            yield Member(name, key, extension.lower(), (member.offset_data, member.size))
    _check_end(path, end)


def _plain(name: str) -> str:
    # Bytes that are no UTF-8 cannot be printed, and print is what keys are for.
    return name.removeprefix("./").encode(errors="surrogateescape").decode(errors="replace")


def _check_end(path: Path, end: int) -> None:
    """Check that nothing but zeros, and at least a block of them, lies behind the last member."""
    with path.open("rb") as file:
        file.seek(end)
        first = file.read(BLOCK)
        if len(first) < BLOCK:
            raise UserError(f"'{path}' is truncated (its end is missing); write the shard again")
        if any(first):
            raise UserError(
                f"'{path}' is damaged at byte {end}: no member starts there; write the shard again"
            )
        while piece := file.read(1 << 20):
            if any(piece):
                raise UserError(
                    f"'{path}' goes on behind its end (tars joined by cat?), and only the first would be "
                    "read; unpack it and write one tar"
                )


def _why(path: Path, error: BaseException) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as unreadable:
        return f"cannot be read ({unreadable.strerror})"
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), "")
    if kind:
        return f"is compressed ({kind}); images are read where they lie, so unpack it to a plain .tar"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"is not a tar or is truncated ({text}); write the shard again"


def _by_key(path: Path, members: Iterator[Member]) -> dict[str, Member]:
    found: dict[str, Member] = {}
    for member in members:
        if member.key in found:
            both = " and ".join(dict.fromkeys(f"'{name}'" for name in (found[member.key].name, member.name)))
            raise UserError(
                f"'{path}' holds '{member.key}' twice ({both}); write the shard again with unique keys"
            )
        found[member.key] = member
    return found


def _is_extra(key: str, whole: set[str]) -> bool:
    """Say whether a member belongs to an image as something more of it: ``a.mask.png`` beside ``a.jpg``."""
    while "." in posixpath.basename(key):
        key = posixpath.splitext(key)[0]
        if key in whole:
            return True
    return False


def _complaint(lonely: list[Member], members: list[Member]) -> str:
    """Say what the first of the members without a partner lacks, and how many more there are."""
    first = lonely[0]
    more = f" (and {len(lonely) - 1} more members lack theirs)" if len(lonely) > 1 else ""
    if first.extension != ".json":
        return f"'{first.name}' has no '{first.key}.json' with its boxes{more}"
    other = [
        member.name
        for member in members
        if member.key == first.key and member.extension in FOREIGN_EXTENSIONS
    ]
    if other:
        return f"'{other[0]}' is of a format that shards do not hold: JPEG, PNG or WebP{more}"
    return f"'{first.name}' has no image '{first.key}.jpg' (.jpeg, .png, .webp){more}"


class HeaderRows:
    """Rows made by reading a tar's headers, packed into arrays that forked workers share.

    ``images`` and ``boxes`` are their numbers; boxes are 0, and :meth:`box_ends` empty, unless
    ``count_boxes`` has every JSON read too.
    """

    def __init__(self, path: Path, *, count_boxes: bool = False) -> None:
        members = read_members(path)
        keys = [key.encode() for key in members]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *(len(key) for key in keys)])
        self._places = np.array(list(members.values()), np.int64).reshape(-1, 4)
        self.images = len(self._places)
        self._box_ends = _count_boxes(path, self._places[:, 2:] if count_boxes else self._places[:0, 2:])
        self.boxes = int(self._box_ends[-1]) if len(self._box_ends) else 0

    def row(self, number: int) -> ImageRow:
        """Return an image's row, without frame and boxes."""
        start, end = self._key_ends[number : number + 2]
        offset, size, json_offset, json_size = self._places[number].tolist()
        return ImageRow(self._keys[start:end].decode(), (offset, size), (json_offset, json_size))

    def box_ends(self) -> np.ndarray:
        """Return for each image the number of boxes of the shard up to and with its own, int64 ``n``."""
        return self._box_ends


def _count_boxes(path: Path, places: np.ndarray) -> np.ndarray:
    counts = []
    files = LocalFiles()
    for offset, size in places.tolist():
        try:
            counts.append(len(json.loads(files.read(str(path), offset, size))["boxes"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            counts.append(1)  # so that the image gets its turn, and is counted as what it is
    return np.cumsum(np.array(counts, np.int64))


def _layout(data: bytes) -> dict[str, Array]:
    """Find the arrays of an uncompressed npz file: offset of the values, dtype and shape."""
    places: dict[str, Array] = {}
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


def _check_columns(data: bytes, places: dict[str, Array], images: int) -> None:
    """Raise a ValueError where an array is missing, of another type or shape, or contradicts another."""
    for name, (kind, row) in COLUMNS.items():
        offset, dtype, shape = places[name]
        rows = shape[0] if name in ENDS.values() and shape else images
        if dtype != kind or shape != (rows, *row) or not 0 <= _bytes(dtype, shape) <= len(data) - offset:
            raise ValueError(f"'{name}' is {dtype} of the shape {shape}")
    values = {name: _values(data, places[name]) for name, (_, row) in COLUMNS.items() if not row}
    for ends, of in ENDS.items():
        steps = np.diff(values[ends], prepend=0)
        if steps.min(initial=0) < 0 or steps.sum() != places[of][2][0]:
            raise ValueError(f"'{ends}' does not fit '{of}'")
    if any(values[name].min(initial=0) < 0 for name in values):
        raise ValueError("a place or size is negative")


def _values(data: bytes, place: Array) -> np.ndarray:
    offset, dtype, shape = place
    return np.frombuffer(data, dtype, math.prod(shape), offset)


class IndexFile:
    """Rows read from a local ``.index.npz`` of so many images, a few bytes at a time.

    ``digest`` is the hexadecimal BLAKE2b that the file must have; None does not check.

    Raises:
        DamagedIndexError: it is no index file, or another than ``shards.json`` tells of.
        OSError: it cannot be read.
    """

    def __init__(self, path: str, images: int, files: LocalFiles, digest: str | None = None) -> None:
        data = Path(path).read_bytes()
        if digest is not None and digest_of(data).hex() != digest:
            raise DamagedIndexError(f"'{path}' is not the index that {MANIFEST_NAME} tells of")
        try:
            self._places = _layout(data)
            _check_columns(data, self._places, images)
        except Exception as error:  # zipfile and numpy raise whatever their parsers stumble over
            what = " ".join(str(error).split()) or type(error).__name__
            raise DamagedIndexError(f"'{path}' is not an index of {images} images ({what})") from error
        self._path, self._files, self._images = path, files, images

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

    def row(self, number: int) -> ImageRow:
        """Return an image's row; DamagedIndexError where its numbers contradict each other."""
        try:
            key = self._read("key_bytes", *self._span("key_end", number)).tobytes().decode()
        except UnicodeDecodeError as error:
            raise DamagedIndexError(f"'{self._path}': a key is not UTF-8") from error
        return ImageRow(
            key=key,
            image=(self._one("picture_offset", number), self._one("picture_size", number)),
            annotation=(self._one("json_offset", number), self._one("json_size", number)),
            frame=(self._one("width", number), self._one("height", number)),
            boxes=self._read("boxes", *self._span("box_end", number)),
            digest=self._read("picture_hash", number, number + 1).tobytes(),
        )

    def box_ends(self) -> np.ndarray:
        """Return for each image the number of boxes of the shard up to and with its own, int64 ``n``."""
        return self._read("box_end", 0, self._images)


def _bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)
