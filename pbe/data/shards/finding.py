"""Which shards a folder, a pattern or a URL names."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import braceexpand

from pbe.data.shards.format import MANIFEST_NAME
from pbe.data.shards.index import IndexedShard, parse_manifest
from pbe.data.shards.remote import PIPE, is_url, join, read_manifest
from pbe.errors import UserError

PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def find_shards(pattern: str | Path) -> list[Path]:
    """Return the tars that a folder, a file, a glob or a brace pattern (``train-{000..007}.tar``) names.

    What exists under the very name that is given is taken as it is, brackets and braces included.
    """
    text = os.path.expanduser(str(pattern))
    if not text:
        raise UserError("no shards given; set data.train_shards and data.validation_shards")
    try:
        found = _named_shards(text)
        hint = "" if found else _hint(Path(text))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"the shards '{text}' cannot be read ({reason})") from error
    if not found:
        raise UserError(f"no shards (.tar) found at '{text}'{hint}")
    return found


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
