"""Exact and near duplicates by hashes, inside a set and against a benchmark, for millions of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pbe.data.packing.index import digest
from pbe.data.packing.pixels import check_and_hash
from pbe.data.sources.image_files import UnreadableImageError, find_images, inspect_image

NEAR_BITS = 3
BANDS, BAND_BITS = 4, 16
BLOCK_PAIRS = 1 << 22


@dataclass(frozen=True)
class Hashes:
    """Hashes of some pictures.

    Attributes:
        names: one a picture.
        exact: 16 bytes a picture, dtype ``S16``-like void of shape ``(n,)``.
        near: uint64 ``(n,)``; 0 where there is none.
    """

    names: list[str]
    exact: np.ndarray
    near: np.ndarray


def _pairs_of_sorted(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield index pairs (i < j) of equal keys, of a sorted array, in blocks of bounded size."""
    end = np.searchsorted(keys, keys, "right")
    counts = end - np.arange(len(keys)) - 1
    start = 0
    total = np.concatenate([[0], np.cumsum(counts)])
    while start < len(keys):
        stop = int(np.searchsorted(total, total[start] + BLOCK_PAIRS, "right")) - 1
        stop = max(stop, start + 1)
        part = counts[start:stop]
        first = np.repeat(np.arange(start, stop), part)
        within = np.arange(int(part.sum())) - np.repeat(np.cumsum(part) - part, part)
        yield first, first + 1 + within
        start = stop


def near_pairs(hashes: np.ndarray, distance: int = NEAR_BITS) -> np.ndarray:
    """Return the pairs (i < j) of hashes that differ in at most ``distance`` bits, int64 ``(n, 2)``, sorted.

    Two hashes that differ in at most three bits agree in at least one of four bands of 16 bits, so only
    those that share a band are compared. Hashes of 0 (no structure) match nothing.

    Args:
        hashes: uint64 ``(n,)``.
        distance: 0 to 3.

    Raises:
        ValueError: for a larger distance, which bands cannot find.
    """
    if not 0 <= distance < BANDS:
        raise ValueError(f"distance must be 0 to {BANDS - 1}, not {distance}")
    rows = np.flatnonzero(hashes)
    found: list[np.ndarray] = [np.empty((0, 2), np.int64)]
    for band in range(BANDS):
        keys = (hashes[rows] >> np.uint64(BAND_BITS * band)).astype(np.uint16)
        order = rows[np.argsort(keys, kind="stable")]
        for i, j in _pairs_of_sorted(np.sort(keys, kind="stable")):
            a, b = order[i], order[j]
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
            pairs = np.stack([a[close], b[close]], axis=1)
            found.append(np.sort(pairs, axis=1))
    return np.unique(np.concatenate(found), axis=0)


def exact_pairs(hashes: np.ndarray) -> np.ndarray:
    """Return (first, other) of pictures with equal bytes, int64 ``(n, 2)``: one pair for every repetition."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[inverse]
    repeated = np.flatnonzero(original != np.arange(len(hashes)))
    return np.stack([original[repeated], repeated], axis=1).astype(np.int64)


def hash_folder(folder: Path) -> tuple[Hashes, int]:
    """Hash every picture of a benchmark folder; returns the hashes and how many could not be read."""
    table, _ = find_images([folder])
    names, exact, near = [], [], []
    unreadable = 0
    for path, name in table.select("path", "name").iter_rows():
        try:
            encoded = Path(path).read_bytes()
            fingerprint = check_and_hash(encoded, inspect_image(encoded))
        except (OSError, UnreadableImageError):
            unreadable += 1
            continue
        names.append(name)
        exact.append(digest(encoded))
        near.append(fingerprint)
    return Hashes(names, as_void(b"".join(exact)), np.array(near, np.uint64)), unreadable


def as_void(joined: bytes | np.ndarray) -> np.ndarray:
    """Return 16-byte hashes, joined or as uint8 ``n 16``, as an array of one element a hash."""
    flat = np.frombuffer(joined, np.uint8) if isinstance(joined, bytes) else joined
    return np.ascontiguousarray(flat).reshape(-1, 16).view("V16").ravel()


def near_duplicates(hashes: np.ndarray, distance: int = NEAR_BITS) -> np.ndarray:
    """Return pairs (first, other) of pictures that look the same, int64 ``(n, 2)``, sorted.

    Pictures of one and the same hash are paired with the first of them only, and only the firsts with each
    other: a set in which a picture stands ten thousand times has not fifty million pairs.

    Args:
        hashes: uint64 ``(n,)``; 0 matches nothing.
        distance: most bits that differ, 0 to 3.
    """
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[inverse]
    repeated = np.flatnonzero((original != np.arange(len(hashes))) & (hashes != 0))
    same = np.stack([original[repeated], repeated], axis=1)
    close = np.sort(first[near_pairs(values, distance)], axis=1)
    return np.unique(np.concatenate([same, close]).astype(np.int64), axis=0)


def matches(ours: Hashes, theirs: Hashes, distance: int = NEAR_BITS) -> list[tuple[str, str, str]]:
    """Return (our name, their name, ``exact`` or ``near``) of pictures that stand in both sets, sorted."""
    exact = set(_cross_exact(ours.exact, theirs.exact))
    our_values, their_values = np.unique(ours.near), np.unique(theirs.near)
    pairs = near_pairs(np.concatenate([our_values, their_values]), distance)
    count = len(our_values)
    close = set()
    for a, b in pairs[(pairs[:, 0] < count) & (pairs[:, 1] >= count)]:
        for i in np.flatnonzero(ours.near == our_values[a]):
            close |= {(int(i), int(j)) for j in np.flatnonzero(theirs.near == their_values[b - count])}
    found = [(ours.names[a], theirs.names[b], "exact") for a, b in exact]
    return sorted(found + [(ours.names[a], theirs.names[b], "near") for a, b in close - exact])


def _cross_exact(ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[int, int]]:
    where: dict[bytes, list[int]] = {}
    for row, value in enumerate(theirs):
        where.setdefault(value.tobytes(), []).append(row)
    wanted = np.flatnonzero(np.isin(ours, theirs)).tolist() if len(theirs) else []
    for row in wanted:
        for other in where[ours[row].tobytes()]:
            yield row, other
