"""Exact and near duplicates by hashes, inside a set and against a benchmark, for millions of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pbe.data.samples.crops import resize_area
from pbe.data.samples.decode import UnusableImageError, decode
from pbe.data.shards.format import digest
from pbe.data.sources.annotations import find_images
from pbe.data.sources.image_files import (
    CANNOT_DECODE,
    ImageHeader,
    UnreadableImageError,
    first_frame,
    inspect_image,
)

HASH_SIDE, HASH_BITS = 32, 8
MIN_CONTRAST = 2.0
REDUCED = ((512, cv2.IMREAD_REDUCED_GRAYSCALE_8), (256, cv2.IMREAD_REDUCED_GRAYSCALE_4))
NEAR_BITS = 3
BANDS, BAND_BITS = 4, 16
BLOCK_PAIRS = 1 << 22


@dataclass(frozen=True)
class Hashes:
    """Hashes of ``n`` images."""

    names: list[str]
    exact: np.ndarray  # n, void of 16 bytes
    near: np.ndarray  # n, uint64; 0 where there is none


def perceptual_hash(grey: np.ndarray) -> int:
    """Return a 64-bit hash of uint8 ``h w`` that survives scaling and recompression; 0 without structure.

    Signs, against their median, of the 64 lowest frequencies (without the constant) of a 32 x 32 image.
    """
    small = resize_area(grey, HASH_SIDE, HASH_SIDE).astype(np.float32)
    if small.std() < MIN_CONTRAST:
        return 0
    spectrum = cv2.dct(small)[: HASH_BITS + 1, : HASH_BITS + 1]
    values = np.concatenate([spectrum[:HASH_BITS, :HASH_BITS].ravel()[1:], spectrum[:1, HASH_BITS]])
    bits = values > np.median(values)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def check_and_hash(encoded: bytes, header: ImageHeader) -> int:
    """Return the perceptual hash of an image, decoded small where the format allows it.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    if not header.extension or header.frames > 1:
        return perceptual_hash(cv2.cvtColor(first_frame(encoded), cv2.COLOR_RGB2GRAY))
    short = min(header.stored_size)
    flag = next((flag for side, flag in REDUCED if short >= side), cv2.IMREAD_GRAYSCALE)
    try:
        return perceptual_hash(decode(encoded, flag))
    except UnusableImageError as error:
        raise UnreadableImageError(CANNOT_DECODE) from error


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
    those that share a band are compared. Hashes, uint64 ``(n,)``, of 0 (no structure) match nothing.

    Raises:
        ValueError: for a distance above three, which bands cannot find.
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
    """Return (first, other) of images with equal hashes, int64 ``(n, 2)``: one pair for every repetition."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[inverse]
    repeated = np.flatnonzero(original != np.arange(len(hashes)))
    return np.stack([original[repeated], repeated], axis=1).astype(np.int64)


def near_duplicates(hashes: np.ndarray, distance: int = NEAR_BITS) -> np.ndarray:
    """Return pairs (first, other) of images that look the same, int64 ``(n, 2)``, sorted.

    Images of one and the same hash are paired with the first of them only, and only the firsts with each
    other: a set in which an image stands ten thousand times has not fifty million pairs.
    """
    values, first = np.unique(hashes, return_index=True)
    same = exact_pairs(hashes)
    close = np.sort(first[near_pairs(values, distance)], axis=1)
    return np.unique(np.concatenate([same[hashes[same[:, 0]] != 0], close]).astype(np.int64), axis=0)


def hash_folder(folder: Path) -> tuple[Hashes, int]:
    """Hash every image of a benchmark folder; returns the hashes and how many could not be read."""
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


def matches(ours: Hashes, theirs: Hashes, distance: int = NEAR_BITS) -> list[tuple[str, str, str]]:
    """Return (our name, their name, ``exact`` or ``near``) of images that stand in both sets, sorted."""
    where: dict[bytes, list[int]] = {}
    for row, value in enumerate(theirs.exact):
        where.setdefault(value.tobytes(), []).append(row)
    shared = np.flatnonzero(np.isin(ours.exact, theirs.exact)).tolist() if where else []
    exact = {(row, other) for row in shared for other in where[ours.exact[row].tobytes()]}
    our_values, their_values = np.unique(ours.near), np.unique(theirs.near)
    pairs = near_pairs(np.concatenate([our_values, their_values]), distance)
    count = len(our_values)
    close = set()
    for a, b in pairs[(pairs[:, 0] < count) & (pairs[:, 1] >= count)]:
        for i in np.flatnonzero(ours.near == our_values[a]):
            close |= {(int(i), int(j)) for j in np.flatnonzero(theirs.near == their_values[b - count])}
    found = [(ours.names[a], theirs.names[b], "exact") for a, b in exact]
    return sorted(found + [(ours.names[a], theirs.names[b], "near") for a, b in close - exact])
