"""Where the images of a tar lie, and their JSON: read from its headers, whoever wrote it.

Members pair by their name without its ending, ``a.v1.jpg`` with ``a.v1.json``, wherever they stand. ``./`` in
front is left out, and so are folders, macOS's ``._`` companions and members of other kinds. What belongs to
nothing, or cannot be told apart, is an error that names it: no image is left out in silence.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pbe.errors import UserError

PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
FOREIGN_EXTENSIONS = (".bmp", ".gif", ".tif", ".tiff", ".jfif", ".avif", ".heic", ".jp2", ".ppm", ".tga")
BLOCK = tarfile.BLOCKSIZE
COMPANION = "._"
MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip", b"Rar!": "rar", b"7z\xbc\xaf": "7z",
}  # fmt: skip
Place = tuple[int, int]


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
    images = _by_key(path, (member for member in members if member.extension in PICTURE_EXTENSIONS))
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
            if member.issparse() and extension.lower() in (*PICTURE_EXTENSIONS, ".json"):
                raise UserError(f"'{path}' holds '{name}' as a sparse file; write it again without --sparse")
            yield Member(name, key, extension.lower(), (member.offset_data, member.size))
    _check_end(path, end)


def _plain(name: str) -> str:
    # Bytes that are no UTF-8 cannot be printed, and print is what keys are for.
    return name.removeprefix("./").encode(errors="surrogateescape").decode(errors="replace")


def _check_end(path: Path, end: int) -> None:
    """Check that nothing but zeros, and at least a block of them, lies behind the last member."""
    again = "write the shard again"
    with path.open("rb") as file:
        file.seek(end)
        first = file.read(BLOCK)
        if len(first) < BLOCK:
            raise UserError(f"'{path}' is truncated (its end is missing); {again}")
        if any(first):
            raise UserError(f"'{path}' is damaged at byte {end}: no member starts there; {again}")
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
