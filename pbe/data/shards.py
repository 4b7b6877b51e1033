"""Shards: WebDataset tars of pictures and their boxes, written atomically and read at random.

A picture is two neighbouring members that share a key: the picture's own bytes (``.jpg``, ``.png`` or
``.webp``) and a ``.json`` with its boxes in pixels, x2 and y2 exclusive::

    {"width": 144, "height": 96, "boxes": [{"xyxy": [x1, y1, x2, y2], "label": "teapot"}]}

Any WebDataset reader streams them; this module also finds the picture at any position, from an index that
is made by reading the tars' headers only.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import braceexpand
import webdataset

from pbe.errors import UserError
from pbe.files import make_folder

PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class ShardRecord:
    """One picture on its way into a shard.

    Attributes:
        key: unique name; dots and slashes are not allowed (WebDataset splits names at the first dot).
        picture: the encoded file.
        extension: of the file: ``jpg``, ``png`` or ``webp``.
        width: pixels.
        height: pixels.
        boxes: ``(x1, y1, x2, y2)`` in pixels.
        labels: one a box, or none at all.
    """

    key: str
    picture: bytes
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


class _ShardWriter:
    """Writes one tar under a temporary name and gives it its own name when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.bytes = 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        # Fixed owner and time, so that the same pictures give the same bytes.
        self._tar = webdataset.TarWriter(
            self._file, user="pbe", group="pbe", mode=0o644, mtime=0, encoder=False
        )

    def write(self, record: ShardRecord) -> None:
        annotation = json.dumps(record.annotation(), separators=(",", ":")).encode()
        members = {"__key__": record.key, record.extension: record.picture, "json": annotation}
        self.bytes += self._tar.write(members)
        self.count += 1

    def finish(self) -> Path:
        self._tar.close()
        self._file.close()
        os.replace(self._temporary, self.path)
        return self.path

    def abandon(self) -> None:
        self._tar.close()
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_shards(
    records: Iterable[ShardRecord],
    folder: str | Path,
    *,
    max_count: int = 2000,
    max_bytes: int = 256 * 2**20,
    prefix: str = "shard",
) -> list[Path]:
    """Write pictures into ``folder/prefix-000000.tar`` and so on; a shard appears only when it is complete.

    Shards of the same prefix that an earlier, longer run left behind are removed at the end.

    Args:
        records: the pictures, in order.
        folder: created where missing; shards of the same name are replaced.
        max_count: pictures a shard.
        max_bytes: bytes of members after which a shard is closed.
        prefix: of the files' names.

    Returns:
        The shards written, in order.

    Raises:
        UserError: for a key that WebDataset would split, or a folder that cannot be made or written to.
    """
    folder = make_folder(folder)
    paths: list[Path] = []
    writer: _ShardWriter | None = None
    try:
        for record in records:
            if "." in record.key or "/" in record.key:
                raise UserError(f"shard key '{record.key}' holds a dot or a slash; use a plain name")
            writer = writer or _ShardWriter(folder / f"{prefix}-{len(paths):06d}.tar")
            writer.write(record)
            if writer.count >= max_count or writer.bytes >= max_bytes:
                paths.append(writer.finish())
                writer = None
        if writer is not None:
            paths.append(writer.finish())
            writer = None
    finally:
        if writer is not None:
            writer.abandon()
    for stale in set(folder.glob(f"{glob.escape(prefix)}-[0-9][0-9][0-9][0-9][0-9][0-9].tar")) - set(paths):
        stale.unlink()
    return paths


def find_shards(pattern: str | Path) -> list[Path]:
    """Return the tars that a folder, a file, a glob or a brace pattern (``train-{000..007}.tar``) names.

    Raises:
        UserError: when nothing is found.
    """
    text = str(pattern)
    if not text:
        raise UserError("no shards given; set data.train_shards and data.validation_shards")
    if Path(text).is_dir():
        found = sorted(Path(text).glob("*.tar"))
    else:
        names = [name for part in braceexpand.braceexpand(text) for name in sorted(glob.glob(part))]
        found = [Path(name) for name in dict.fromkeys(names)]
    if not found:
        raise UserError(f"no shards (.tar) found at '{text}'; give a folder, a glob or a brace pattern")
    return found


@dataclass(frozen=True)
class ShardEntry:
    """Where one picture lies: shard number, then offset and size in bytes of the picture and of its JSON."""

    key: str
    shard: int
    picture: tuple[int, int]
    annotation: tuple[int, int]


def _index_shard(path: Path, number: int) -> list[ShardEntry]:
    """Read a tar's headers and pair its pictures with their annotations."""
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
    return [ShardEntry(key, number, place, annotations[key]) for key, place in pictures.items()]


class ShardPictures(Sequence[ShardEntry]):
    """The pictures of some shards, by position; made by reading headers only.

    Shards are opened when first read from, once a process, so the object may be sent to workers.

    Args:
        pattern: see :func:`find_shards`.

    Raises:
        UserError: when nothing is found or a shard is no whole tar.
    """

    def __init__(self, pattern: str | Path) -> None:
        self.paths = find_shards(pattern)
        numbered = enumerate(self.paths)
        self.entries = [entry for number, path in numbered for entry in _index_shard(path, number)]
        if not self.entries:
            raise UserError(f"the shards at '{pattern}' hold no pictures")
        self._files: dict[int, int] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.entries)

    def __getitem__(self, position: Any) -> Any:
        """Return the entry, or the list of entries of a slice, at ``position``."""
        return self.entries[position]

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when sent to another process."""
        return {**self.__dict__, "_files": {}}

    def picture(self, position: int) -> bytes:
        """Return the encoded picture at ``position``; OSError when the shard can no longer be read."""
        entry = self.entries[position]
        return self._read(entry.shard, *entry.picture)

    def annotation(self, position: int) -> dict[str, Any]:
        """Return the parsed JSON at ``position``.

        Raises:
            ValueError: when it is no JSON object.
            OSError: when the shard can no longer be read.
        """
        entry = self.entries[position]
        parsed = json.loads(self._read(entry.shard, *entry.annotation))
        if not isinstance(parsed, dict):
            raise ValueError("the annotation is not a JSON object")
        return parsed

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if self._process != os.getpid():  # a forked worker opens its own files
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], size, offset)
        if len(data) != size:
            raise OSError(f"'{self.paths[shard]}' was cut short while in use")
        return data
