"""Shards behind a URL (HTTP, S3, GCS and whatever else fsspec knows), read by byte ranges.

Images are fetched one by one, each with a request of its own. Index files, of which every sample needs a
few numbers, are copied to a local folder when first needed, and trusted by their hash.

WebDataset's pipes (``pipe:COMMAND``) are the slow way: they know neither ranges nor an index, so their tars
are copied as a whole before anything else happens.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import braceexpand
import fsspec
import webdataset

from pbe.data.shards.format import MANIFEST_NAME, DamagedIndexError, digest as digest_of
from pbe.errors import UserError
from pbe.files import atomic_file, atomic_write, make_folder

LOG = logging.getLogger(__name__)
PIPE = "pipe:"
PAUSES = (0.2, 1.0)  # seconds before the second and the third try
T = TypeVar("T")


def is_url(text: str) -> bool:
    """Say whether a pattern of shards is a URL rather than a path."""
    return "://" in text and not text.startswith(PIPE)


def join(base: str, name: str) -> str:
    """Return the URL of a file beside ``shards.json``; ``base`` is the folder or that file itself."""
    return f"{base.removesuffix(MANIFEST_NAME).rstrip('/')}/{name}"


def _retry(fetch: Callable[[], T], url: str) -> T:
    """Call up to three times; every failure of a backend becomes an OSError."""
    for pause in (*PAUSES, None):
        try:
            return fetch()
        except FileNotFoundError:
            raise
        except Exception as error:  # the backends' errors share no base class
            if pause is None:
                raise OSError(f"'{url}' cannot be read ({type(error).__name__}: {error})") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


@functools.lru_cache(maxsize=8)
def _connection(protocol: str, _: int) -> fsspec.AbstractFileSystem:
    # By process: connections and event loops do not survive a fork.
    return fsspec.filesystem(protocol)


def _filesystem(url: str) -> fsspec.AbstractFileSystem:
    return _connection(url.split("://", 1)[0], os.getpid())


class RemoteFiles:
    """Reads pieces of remote files, one request a piece."""

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return exactly ``size`` bytes from ``offset`` on; OSError where three tries do not give them."""
        data = _retry(lambda: _filesystem(path).cat_file(path, start=offset, end=offset + size), path)
        if len(data) != size:
            raise OSError(f"'{path}' gave {len(data)} bytes where {size} were asked for")
        return bytes(data)


def read_whole(url: str) -> bytes:
    """Return a remote file's content; OSError where it cannot be read."""
    return bytes(_retry(lambda: _filesystem(url).cat_file(url), url))


def read_manifest(base: str) -> tuple[str, bytes]:
    """Return the URL and the content of ``shards.json`` in a remote folder."""
    url = join(base, MANIFEST_NAME)
    try:
        return url, read_whole(url)
    except FileNotFoundError as error:
        raise UserError(
            f"no '{url}'; give the URL of a folder of packed shards, or fetch tars by 'pipe:COMMAND'"
        ) from error
    except OSError as error:
        raise UserError(f"{error}; check the URL, the network and the store's credentials") from error


def check_ranges(url: str) -> None:
    """Check that a server hands out pieces of files."""
    try:
        RemoteFiles().read(url, 0, 512)
    except FileNotFoundError:
        return  # a missing shard is counted when its turn comes
    except OSError as error:
        raise UserError(f"the server must serve byte ranges: {error}") from error


def default_cache() -> Path:
    """Return the folder where copies of remote files go unless the configuration names another."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pbe" / "remote"


def cached_copy(url: str, digest: str, folder: Path) -> str:
    """Return the path of a local copy of an index file, fetched unless a copy of the same hash is there.

    Raises DamagedIndexError where the remote file has another hash.
    """
    path = folder / f"{digest}.npz"
    if not path.exists():
        data = read_whole(url)
        if digest_of(data).hex() != digest:
            raise DamagedIndexError(f"'{url}' is not the index that {MANIFEST_NAME} tells of")
        make_folder(folder)
        atomic_write(path, data)
    return str(path)


def spool(pattern: str, folder: Path) -> list[Path]:
    """Return local copies of the tars that ``pipe:COMMAND`` writes, a shell command; braces make several.

    Those that are there already, known by the command's text alone, are not made again.
    """
    paths = []
    for url in braceexpand.braceexpand(pattern):
        path = make_folder(folder) / f"{digest_of(url.encode()).hex()}.tar"
        paths.append(path)
        if path.exists():
            continue
        LOG.info("copying '%s' to '%s'", url, path)
        try:
            with atomic_file(path) as copy, webdataset.gopen(url) as stream:
                shutil.copyfileobj(stream, copy)
        except OSError as error:
            raise UserError(
                f"'{url}' failed ({' '.join(str(error).split())}); try the command by hand"
            ) from error
    return paths
