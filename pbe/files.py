"""Folders that commands write into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pbe.errors import UserError


def expand_home(path: str) -> str:
    """Return a path with a leading ``~`` or ``~user`` replaced by that home folder; any other as it is.

    Shells expand it only at the start of a word, so it arrives unexpanded in files and in ``--out=~/x``.
    """
    return os.path.expanduser(path)


def make_folder(path: str | Path) -> Path:
    """Make a folder of outputs where it is missing, check that it can be written to, and return it.

    Raises:
        UserError: it is a file, or cannot be made or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{path}': {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"the folder '{path}' cannot be written to")
    return path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder of outputs, and take it away again where the ``with`` block fails with nothing in it.

    Raises:
        UserError: as :func:`make_folder`.
    """
    path = Path(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # something lies in it
            for folder in made:
                folder.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error


def check_file(path: str | Path, *, make: bool = True) -> Path:
    """Check that a file of outputs can be written, and return its path.

    Args:
        path: of the file.
        make: make its folder where that is missing; without it, the nearest folder that exists is tried.

    Raises:
        UserError: it is a folder, or nothing can be written there.
    """
    path = Path(path)
    if make:
        make_folder(path.parent)
    there = next((folder for folder in path.parents if folder.is_dir()), Path())
    probe = there / f".{path.name}.{os.getpid()}"
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error
    return path
