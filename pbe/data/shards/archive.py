"""Shards: WebDataset tars of images and their boxes, written atomically and read at random.

An image is two neighbouring members that share a key: the image's own bytes (``.jpg``, ``.png`` or
``.webp``) and a ``.json`` with its boxes in pixels, x2 and y2 exclusive::

    {"width": 144, "height": 96, "boxes": [{"xyxy": [x1, y1, x2, y2], "label": "teapot"}]}

Any WebDataset reader streams them; this module also finds the image at any position, from the index beside
the shards, or else from one that is made by reading the tars' headers (see :mod:`pbe.data.shards.index`).
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from pbe.data.shards.format import (
    MANIFEST_NAME,
    PACK_AGAIN,
    DamagedIndexError,
    ShardWriter,
    load_manifest,
    manifest_errors,
    new_shard,
)
from pbe.data.shards.index import (
    HeaderRows,
    ImageRow,
    IndexFile,
    LocalFiles,
)
from pbe.data.shards.remote import (
    PIPE,
    RemoteFiles,
    cached_copy,
    check_ranges,
    default_cache,
    is_url,
    join,
    read_manifest,
    spool,
)
from pbe.errors import UserError
from pbe.files import make_folder

MAX_COUNT = 2**40  # of a shard's images and boxes
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


@dataclass(frozen=True)
class ShardRecord:
    """One image on its way into a shard.

    Attributes:
        key: unique name; dots and slashes are not allowed (WebDataset splits names at the first dot).
        image: the encoded file.
        extension: of the file: ``jpg``, ``png`` or ``webp``.
        width: pixels.
        height: pixels.
        boxes: ``(x1, y1, x2, y2)`` in pixels.
        labels: one a box, or none at all.
    """

    key: str
    image: bytes
    extension: str
    width: int
    height: int
    boxes: Sequence[Sequence[float]]
    labels: Sequence[str] = field(default_factory=tuple)

    def annotation(self) -> dict[str, Any]:
        """Return what the ``.json`` member holds."""
        labels = self.labels or [""] * len(self.boxes)
        boxes = [
            {"xyxy": [float(value) for value in box], "label": label}
            for box, label in zip(self.boxes, labels, strict=True)
        ]
        return {"width": self.width, "height": self.height, "boxes": boxes}


def write_shards(
    records: Iterable[ShardRecord],
    folder: str | Path,
    *,
    max_count: int = 2000,
    max_bytes: int = 256 * 2**20,
    prefix: str = "shard",
) -> list[Path]:
    """Write images in order into ``folder/prefix-000000.tar`` and so on, and return the paths.

    A shard appears only when it is complete, with at most ``max_count`` images; it is closed after
    ``max_bytes`` of members. Shards of the same prefix that a longer run left behind are removed at the end.
    """
    folder = make_folder(folder)
    if (folder / MANIFEST_NAME).exists():
        raise UserError(f"'{folder}' holds shards that pbe prepare has packed; name another folder")
    paths: list[Path] = []
    shard: ShardWriter | None = None
    count = size = 0
    with ExitStack() as opened:
        for record in records:
            if shard is None or count >= max_count or size >= max_bytes:
                opened.close()  # the shard that is full
                paths.append(folder / f"{prefix}-{len(paths):06d}.tar")
                shard, count, size = opened.enter_context(new_shard(paths[-1], tarfile.PAX_FORMAT)), 0, 0
            if "." in record.key or "/" in record.key:
                raise UserError(f"shard key '{record.key}' holds a dot or a slash; use a plain name")
            annotation = json.dumps(record.annotation(), separators=(",", ":")).encode()
            for extension, data in sorted([(record.extension, record.image), ("json", annotation)]):
                size += shard.add(f"{record.key}.{extension}", data)[1]
            count += 1
    for stale in set(folder.glob(f"{glob.escape(prefix)}-[0-9][0-9][0-9][0-9][0-9][0-9].tar")) - set(paths):
        stale.unlink()
    return paths


@dataclass(frozen=True)
class IndexedShard:
    """What ``shards.json`` says of a shard; the paths lie beside it."""

    path: str
    images: int
    boxes: int
    index: str
    index_digest: str


def parse_manifest(text: bytes | str, source: str, place: Callable[[str], str]) -> list[IndexedShard]:
    """Return the shards that the ``shards.json`` at ``source`` lists.

    ``place`` makes the path of a file beside it from its name.
    """
    content = load_manifest(text, source)
    with manifest_errors(source, PACK_AGAIN):
        return [_parse_shard(shard, place) for shard in content["shards"]]


def _parse_shard(entry: dict[str, Any], place: Callable[[str], str]) -> IndexedShard:
    names = [entry[key] for key in ("name", "index", "index_blake2b")]
    counts = [entry[key] for key in ("pictures", "boxes")]
    if not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise ValueError(f"a shard is called {names[0]!r}, its index {names[1]!r} with the hash {names[2]!r}")
    if not all(type(count) is int and 0 <= count <= MAX_COUNT for count in counts):
        raise ValueError(f"'{names[0]}' has {counts[0]!r} images and {counts[1]!r} boxes")
    return IndexedShard(place(names[0]), counts[0], counts[1], place(names[1]), names[2])


def find_shards(pattern: str | Path) -> list[Path]:
    """Return the tars that a folder, a file, a glob or a brace pattern (``train-{000..007}.tar``) names.

    What exists under the very name that is given is taken as it is, brackets and braces included.
    """
    text = os.path.expanduser(str(pattern))
    if not text:
        raise UserError("no shards are given")
    try:
        found = _named_shards(text)
        hint = "" if found else _hint(Path(text))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"the shards '{text}' cannot be read ({reason})") from error
    if not found:
        raise UserError(f"no shards (.tar) found at '{text}'{hint}")
    return found


@contextmanager
def shards_of(key: str) -> Iterator[None]:
    """Let errors about shards name the key of the configuration that they come from."""
    try:
        yield
    except UserError as error:
        hint = "; leave it empty to train without validation" if key == "data.validation_shards" else ""
        raise UserError(f"{key}: {error}{hint}") from error


def _named_shards(text: str) -> list[Path]:
    if os.path.isdir(text):  # hidden files are macOS's companions of the real ones
        return sorted(path for path in Path(text).glob("*.tar") if not path.name.startswith("."))
    if os.path.exists(text):
        return [Path(text)]
    # Only what lies behind the last folder that exists is a pattern.
    folder = Path(text).parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    rest = str(Path(text).relative_to(folder))
    names: list[str] = []
    for part in braceexpand.braceexpand(rest):
        name = folder / part
        names += [str(name)] if name.exists() else sorted(glob.glob(f"{glob.escape(str(folder))}/{part}"))
    return [Path(name) for name in dict.fromkeys(names)]


def _hint(place: Path) -> str:
    """Say what lies in a folder instead of shards, or what may be given at all."""
    if not place.is_dir():
        return "; give a folder, a glob or a brace pattern (pbe prepare and pbe toy render make shards)"
    names = sorted(path.name for path in place.iterdir() if not path.name.startswith("."))
    packed = next((name for name in names if name.endswith(PACKED_TARS)), "")
    if packed:
        return f"; '{packed}' is compressed, unpack it to a plain .tar"
    inner = next((name for name in names if any((place / name).glob("*.tar"))), "")
    return f"; did you mean '{place / inner}'?" if inner else "; the folder holds none"


def find_indexed(pattern: str) -> list[Path | IndexedShard]:
    """Return the local shards that a pattern names, as ``shards.json`` tells of them where there is one.

    For a folder that file decides, so that a shard that vanished is noticed.
    """
    folder = Path(os.path.expanduser(pattern))
    if pattern and os.path.isfile(folder / MANIFEST_NAME):
        return list(_local_manifest(folder))
    paths = find_shards(pattern)
    parents = {path.parent for path in paths}
    indexed = {Path(shard.path): shard for parent in parents for shard in _local_manifest(parent)}
    return [indexed.get(path, path) for path in paths]


def _local_manifest(folder: Path) -> list[IndexedShard]:
    path = folder / MANIFEST_NAME
    if not os.path.isfile(path):
        return []
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    return parse_manifest(text, str(path), lambda name: str(folder / name))


def remote_shards(base: str) -> list[IndexedShard]:
    """Return the shards that the ``shards.json`` behind a URL tells of."""
    url, manifest = read_manifest(base)
    found = parse_manifest(manifest, url, lambda name: join(base, name))
    if not found:
        raise UserError(f"'{url}' names no shards; pack them again")
    return found


def shard_state(pattern: str) -> list[tuple[str, int | str]]:
    """Return what tells one set of shards from another: names and sizes; remote ones, hashes of the index."""
    if pattern.startswith(PIPE):
        return [(pattern, 0)]
    if is_url(pattern):
        return [(shard.path, shard.index_digest) for shard in remote_shards(pattern)]
    return [(path.name, path.stat().st_size) for path in find_shards(pattern)]


class ShardImages(Sequence[ImageRow]):
    """The images of some shards, by position.

    Where the shards have an index, opening reads the list of the shards only; otherwise the headers of the
    tars. Shards are opened when first read from, in each process anew, so the object may be sent to workers.

    Args:
        pattern: see :func:`find_shards`; or the URL of a folder with an index, or ``pipe:COMMAND`` (see
            :mod:`pbe.data.shards.remote`).
        count_boxes: boxes are to be found by number (:meth:`owner`); shards without an index are read
            through for this.
        verify: check each index against the hash in ``shards.json`` when it is first used.
        cache: folder for copies of what is remote; empty for the user's cache.

    Attributes:
        paths: of the shards.
        box_count: boxes of all images; 0 unless they were counted.
    """

    def __init__(
        self, pattern: str | Path, *, count_boxes: bool = False, verify: bool = False, cache: str = ""
    ) -> None:
        text = str(pattern)
        self._remote = is_url(text)
        self._verify, self._cache = verify, Path(cache) if cache else default_cache()
        found: Sequence[Path | IndexedShard]
        if text.startswith(PIPE):
            found = spool(text, self._cache)
        else:
            found = remote_shards(text) if self._remote else find_indexed(text)
        if self._remote and isinstance(found[0], IndexedShard):
            check_ranges(found[0].path)
        self._files: RemoteFiles | LocalFiles = RemoteFiles() if self._remote else LocalFiles()
        self._index_files = LocalFiles()
        self.paths = [shard.path if isinstance(shard, IndexedShard) else str(shard) for shard in found]
        self._shards = [
            shard if isinstance(shard, IndexedShard) else HeaderRows(shard, count_boxes=count_boxes)
            for shard in found
        ]
        self._indexes: dict[int, IndexFile] = {}
        self._starts = np.cumsum([0, *(shard.images for shard in self._shards)])
        self._box_starts = np.cumsum([0, *(shard.boxes if count_boxes else 0 for shard in self._shards)])
        self.box_count = int(self._box_starts[-1])
        if not len(self):
            raise UserError(f"the shards at '{pattern}' hold no images")

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self._starts[-1])

    def __getitem__(self, position: Any) -> Any:
        """Return the row, or the list of rows of a slice, at ``position``; see :meth:`row`."""
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        return self.row(position)

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was read of the indexes behind when sent to another process."""
        return {**self.__dict__, "_indexes": {}}

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the shard of an image and its number therein."""
        position = int(position)
        position += len(self) if position < 0 else 0
        if not 0 <= position < len(self):
            raise IndexError(f"image {position} of {len(self)}")
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        return shard, position - int(self._starts[shard])

    def _rows(self, number: int) -> HeaderRows | IndexFile:
        shard = self._shards[number]
        if isinstance(shard, HeaderRows):
            return shard
        if number not in self._indexes:
            path, digest = shard.index, shard.index_digest if self._verify else None
            if self._remote:  # a copy is checked when it is made
                path, digest = cached_copy(shard.index, shard.index_digest, self._cache), None
            self._indexes[number] = IndexFile(path, shard.images, self._index_files, digest)
        return self._indexes[number]

    def row(self, position: int) -> ImageRow:
        """Return what the index knows of the image at ``position``.

        Raises:
            DamagedIndexError: the shard's index is not what it should be.
            OSError: it can no longer be read.
        """
        shard, number = self._locate(position)
        return self._rows(shard).row(number)

    def owner(self, box: int) -> tuple[int, int]:
        """Return the position of the image that a box belongs to, and the box's number in the image.

        Boxes count from 0 to ``box_count`` - 1, in the order of the images. Errors as of :meth:`row`.
        """
        shard = int(np.searchsorted(self._box_starts, box, side="right")) - 1
        inside = box - int(self._box_starts[shard])
        ends = self._rows(shard).box_ends()
        if inside >= ends[-1]:
            raise DamagedIndexError(f"the index of '{self.paths[shard]}' lacks boxes; pack the shards again")
        image = int(np.searchsorted(ends, inside, side="right"))
        return int(self._starts[shard]) + image, inside - (int(ends[image - 1]) if image else 0)

    def image(self, position: int) -> bytes:
        """Return the encoded image at ``position``; OSError when the shard can no longer be read."""
        shard, number = self._locate(position)
        return self._files.read(self.paths[shard], *self._rows(shard).row(number).image)

    def read(self, position: int, place: tuple[int, int]) -> bytes:
        """Return a piece (offset and size) of the shard that holds an image; OSError where it is missing."""
        return self._files.read(self.paths[self._locate(position)[0]], *place)

    def annotation(self, position: int) -> dict[str, Any]:
        """Return the parsed JSON at ``position``; ValueError when it is no JSON object."""
        return parse_annotation(self.read(position, self.row(position).annotation))


def parse_annotation(text: bytes) -> dict[str, Any]:
    """Return the JSON object of an image; ValueError when it is none."""
    parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise ValueError("the annotation is not a JSON object")
    return parsed
