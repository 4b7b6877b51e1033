"""Folders and files that commands write: atomic files, checksums and locks.

filelock is not used for the locks: it has no shared ones, leaves no descriptor to child processes, and fails
on file systems without locks.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from pbe.errors import UserError

LOG = logging.getLogger(__name__)
BUFFER = 1 << 20  # bytes
LONGEST_STEM = 200  # bytes of a file's name that its temporary one repeats; file systems allow 255 in all
POLL_SECONDS = 0.5
MOST_RACES = 100  # attempts to make a folder that other runs keep removing
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def expand_home(path: str) -> str:
    """Return a path with a leading ``~`` or ``~user`` replaced by that home folder; any other as it is.

    Shells expand it only at the start of a word, so it arrives unexpanded in files and in ``--out=~/x``.
    """
    return os.path.expanduser(path)


def make_folder(path: str | Path) -> Path:
    """Make a folder of outputs where it is missing, check that it can be written to, and return it."""
    path = Path(path)
    for attempt in range(MOST_RACES):
        # A run that fails removes the folder that it has made, perhaps between two of these lines.
        again = attempt < MOST_RACES - 1
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if again and not os.path.lexists(path) and isinstance(error, FileExistsError | FileNotFoundError):
                continue
            reason = "a file has that name" if path.is_file() else error.strerror
            raise UserError(f"cannot make the folder '{path}': {reason}") from error
        if os.access(path, os.W_OK | os.X_OK):
            break
        if not again or path.exists():
            raise UserError(f"the folder '{path}' cannot be written to")
    return path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder of outputs, and take it away again where the ``with`` block fails with nothing in it."""
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


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, whose files take their places in ``folder`` when all went well.

    A failure on the way leaves what was there before as it was.
    """
    with new_folder(folder), tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        yield Path(staging)
        for path in sorted(p for p in Path(staging).rglob("*") if p.is_file()):
            target = folder / path.relative_to(staging)
            make_folder(target.parent)
            os.replace(path, target)


@contextmanager
def atomic_file(path: Path, *, sync: bool = False, sole_writer: bool = False) -> Iterator[BinaryIO]:
    """Open a file to write that appears as ``path`` when the ``with`` block ends well, whole or not at all.

    Until then it is called ``.NAME.PID.tmp``, and whatever goes wrong removes it.

    Args:
        path: of the file; an older one is replaced.
        sync: make sure that the bytes are on the disk first.
        sole_writer: no other process writes this file. Its temporary name is ``.NAME.tmp`` then, so that what
            a killed process left is overwritten.

    Raises:
        OSError: it cannot be written.
    """
    stem = os.fsdecode(os.fsencode(path.name)[:LONGEST_STEM])
    temporary = path.with_name(f".{stem}.tmp" if sole_writer else f".{stem}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb", buffering=BUFFER) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: bytes | str, *, sync: bool = False) -> None:
    """Write a file, text as UTF-8, as :func:`atomic_file` does.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_file(path, sync=sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_output(path: Path, content: bytes | str) -> None:
    """Write an output file atomically, text as UTF-8; an ``OSError`` becomes a one-line ``UserError``.

    A device or a pipe, ``/dev/stdout`` for one, is written to as it is.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            atomic_write(path, content)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error


def check_file(path: str | Path, *, make: bool = True) -> Path:
    """Check that a file of outputs can be written, and return its path.

    Args:
        path: of the file.
        make: make its folder where that is missing; without it, the nearest folder that exists is tried.
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


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashingFile:
    """A file to write to that hashes and counts what is written.

    Attributes:
        hash: of the bytes so far.
        size: bytes so far.
    """

    def __init__(self, file: IO[bytes], hash: Any) -> None:
        self.file, self.hash, self.size = file, hash, 0

    def write(self, data: bytes) -> int:
        """Write, hash and count."""
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        """Return the bytes written so far."""
        return self.size

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self.file.flush()


class FileLock:
    """A lock that is held; the system releases it when its holder ends, however it ends.

    Attributes:
        descriptor: of the open file. Processes that inherit it hold the lock too.
    """

    def __init__(self, path: Path, file: IO[bytes], keep: bool) -> None:
        self.path, self.keep, self._file = path, keep, file
        self.descriptor = file.fileno()

    def release(self) -> None:
        """Let others have it."""
        if not self.keep:
            self.path.unlink(missing_ok=True)
        self._file.close()


def try_lock(
    path: Path, *, shared: bool = False, keep: bool = False, without_locks: str = ""
) -> FileLock | None:
    """Take a lock, or return None where another process holds it.

    Args:
        path: of the lock file, in an existing folder.
        shared: others may hold it too, if they share it.
        keep: leave the file in place on release; for locks that are shared or inherited.
        without_locks: what users are told to do on a file system without locks, where nothing is locked; that
            is an error unless something is given.

    Raises:
        OSError: the lock file cannot be made, or the file system has no locks.
    """
    import fcntl  # not on every system

    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, mode)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in NO_LOCKS or not without_locks:
                file.close()
                raise
            LOG.warning("'%s' has no file locks: %s", path.parent, without_locks)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return FileLock(path, file, keep)
        file.close()  # its holder has just removed it


@contextmanager
def lock(
    path: Path,
    *,
    shared: bool = False,
    keep: bool = False,
    without_locks: str = "",
    busy: str = "",
    check: Callable[[], object] = lambda: None,
) -> Iterator[FileLock]:
    """Hold a lock for the ``with`` block; its folder is made where it is missing.

    Args:
        path: of the lock file.
        shared: see :func:`try_lock`.
        keep: see :func:`try_lock`.
        without_locks: see :func:`try_lock`.
        busy: complaint where another process holds the lock; without one, the lock is waited for.
        check: called while waiting; what it raises ends the wait.
    """
    while True:
        make_folder(path.parent)
        try:
            if held := try_lock(path, shared=shared, keep=keep, without_locks=without_locks):
                break
        except FileNotFoundError:  # another run failed, and removed the folder that it had made
            continue
        except OSError as error:
            raise UserError(f"cannot lock '{path}': {error.strerror or error}") from error
        if busy:
            raise UserError(busy)
        check()
        time.sleep(POLL_SECONDS)
    try:
        yield held
    finally:
        held.release()
