"""Finding pictures: one walk over the folders, sizes included, sorted by name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from pbe.data.sources.records import PICTURE_COLUMNS
from pbe.errors import UserError

# What is no JPEG, PNG or WebP is encoded again when it is packed, or counted as what Pillow cannot read.
PICTURE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff",
        ".avif", ".heic", ".heif", ".jp2", ".tga", ".ppm", ".pgm",
    }
)  # fmt: skip
SYSTEM_FILES = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})  # others of macOS begin with a dot
BAD_NAME = "file name is not UTF-8"
TWICE = "picture found twice"
AMBIGUOUS_STEM = "different pictures of one name"


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield (name within the root, bytes) of every file below ``folder`` that is not hidden."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in SYSTEM_FILES:
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size


def is_picture(name: str) -> bool:
    """Whether the name's ending is that of a picture."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def need_folder(path: Path, meaning: str) -> Path:
    """Return ``path`` if it is a folder.

    Raises:
        UserError: it is none.
    """
    if not path.is_dir():
        raise UserError(f"{meaning} '{path}' is not a folder")
    return path


def need_file(path: Path, meaning: str) -> Path:
    """Return ``path`` if it is a file.

    Raises:
        UserError: it is none.
    """
    if not path.is_file():
        raise UserError(f"{meaning} '{path}' is not a file")
    return path


def find_files(folder: Path) -> tuple[list[tuple[str, int]], int]:
    """Return (name within ``folder``, bytes) of all files, sorted, and how many names are not UTF-8.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        found = sorted(_walk(str(folder), ""))
    except OSError as error:
        raise UserError(f"cannot read '{error.filename or folder}': {error.strerror}") from error
    good = [(name, size) for name, size in found if name.isprintable() or _is_utf8(name)]
    return good, len(found) - len(good)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_pictures(
    folders: Sequence[Path], *, stems: bool = False, root: Path | None = None
) -> tuple[pl.DataFrame, Counter[str]]:
    """Return the table of all pictures below some folders, sorted by name, and what was dropped.

    Args:
        folders: walked in this order.
        stems: the key is the file's name without folders and ending; of files with the same key and number of
            bytes the first is taken, of others none. Else it is the name within the root, ending included.
        root: names are within this folder; with none, within each of ``folders``.
    """
    schema = {name: PICTURE_COLUMNS[name] for name in ("name", "bytes")}
    tables = [pl.DataFrame(schema={"path": pl.String, **schema})]
    dropped: Counter[str] = Counter()
    for folder in folders:
        files, bad = find_files(need_folder(folder, "the folder of pictures"))
        dropped[BAD_NAME] += bad
        start = f"{folder.relative_to(root).as_posix()}/" if root is not None and folder != root else ""
        found = [file for file in files if is_picture(file[0])]
        table = pl.DataFrame(found, schema=schema, orient="row")
        within, name = pl.lit(f"{folder}/") + pl.col("name"), pl.lit(start) + pl.col("name")
        tables.append(table.select(within.alias("path"), name.alias("name"), "bytes"))
    table = pl.concat(tables)
    stem = pl.col("name").str.replace(r"^.*/", "").str.replace(r"\.[^.]*$", "")
    table = table.with_columns((stem if stems else pl.col("name")).alias("key"))
    copies = table.select(pl.col("bytes").n_unique().over("key") == 1).to_series()
    unique = table.filter(copies).unique("key", keep="first", maintain_order=True)
    alike = int(copies.sum())
    dropped[TWICE] += alike - unique.height
    dropped[AMBIGUOUS_STEM] += table.height - alike
    return complete(unique), +dropped


def complete(pictures: pl.DataFrame) -> pl.DataFrame:
    """Return the table with every column of :data:`PICTURE_COLUMNS`, in their order; new ones are null."""
    absent = [
        pl.lit(None, dtype=kind).alias(name)
        for name, kind in PICTURE_COLUMNS.items()
        if name not in pictures.columns
    ]
    return pictures.with_columns(absent).select(
        [pl.col(name).cast(kind) for name, kind in PICTURE_COLUMNS.items()]
    )
