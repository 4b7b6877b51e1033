"""The report of a packing: everything that was counted, as JSON and as one HTML page.

Exact and near duplicates are found by hashes, inside a set and against a benchmark, for millions of images.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pbe.data.packing.pack import PackRequest, PackResult, read_summary
from pbe.data.packing.worker import EDGES, index_keys, load_index
from pbe.data.shards.format import HASH_BYTES, digest
from pbe.data.sources.annotations import find_images
from pbe.data.sources.image_files import UnreadableImageError, check_and_hash, inspect_image
from pbe.files import atomic_write
from pbe.html import render_page

TEMPLATE = Path(__file__).with_name("report.html.j2")
JSON_NAME, HTML_NAME = "report.json", "report.html"
CHARTS = {
    "area": "Boxes kept, by their share of the image's area",
    "aspect": "Boxes kept, by width over height",
    "boxes_per_picture": "Images kept, by number of boxes",
}
EXAMPLES = 200
LABELS_SHOWN = 50
BANDS, BAND_BITS = 4, 16
BLOCK_PAIRS = 1 << 22


class Hashes(NamedTuple):
    """Hashes of ``n`` images."""

    names: list[str]
    exact: np.ndarray  # n, void of 16 bytes
    near: np.ndarray  # n, uint64; 0 where there is none


Match = tuple[str, str, str]  # two names, and "exact" or "near"


def read_hashes(out: Path, summary: dict[str, Any]) -> Hashes:
    """Return the hashes of all images of some shards, out of their indexes."""
    names, exact, near = [], [np.empty((0, HASH_BYTES), np.uint8)], [np.empty(0, np.uint64)]
    for shard in summary["shards"]:  # one at a time: the boxes take far more memory than the hashes
        index = load_index(out / shard["index"])
        names += index_keys(index)
        exact.append(index["picture_hash"])
        near.append(index["perceptual_hash"])
    return Hashes(names, as_void(np.concatenate(exact)), np.concatenate(near))


def hash_folder(folder: Path) -> tuple[Hashes, int]:
    """Hash every image of a benchmark folder; returns the hashes and how many could not be read."""
    names, exact, near, unreadable = [], bytearray(), [], 0
    for path, name in find_images([folder])[0].select("path", "name").iter_rows():
        try:
            encoded = Path(path).read_bytes()
            near.append(check_and_hash(encoded, inspect_image(encoded)))
        except (OSError, UnreadableImageError):
            unreadable += 1
            continue
        names.append(name)
        exact += digest(encoded)
    return Hashes(names, as_void(np.frombuffer(exact, np.uint8)), np.array(near, np.uint64)), unreadable


def as_void(hashes: np.ndarray) -> np.ndarray:
    """Return 16-byte hashes, uint8 of any shape, as an array of one element a hash."""
    return np.ascontiguousarray(hashes).reshape(-1, HASH_BYTES).view(f"V{HASH_BYTES}").ravel()


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


def near_pairs(hashes: np.ndarray) -> np.ndarray:
    """Return the pairs (i < j) of hashes that differ in at most three bits, int64 ``(n, 2)``, sorted.

    Two such hashes agree in at least one of four bands of 16 bits, so only those that share a band are
    compared. Hashes, uint64 ``(n,)``, of 0 (no structure) match nothing.
    """
    rows = np.flatnonzero(hashes)
    found: list[np.ndarray] = [np.empty((0, 2), np.int64)]
    for band in range(BANDS):
        keys = (hashes[rows] >> np.uint64(BAND_BITS * band)).astype(np.uint16)
        order = rows[np.argsort(keys, kind="stable")]
        for i, j in _pairs_of_sorted(np.sort(keys, kind="stable")):
            a, b = order[i], order[j]
            close = np.bitwise_count(hashes[a] ^ hashes[b]) < BANDS
            pairs = np.stack([a[close], b[close]], axis=1)
            found.append(np.sort(pairs, axis=1))
    return np.unique(np.concatenate(found), axis=0)


def exact_pairs(hashes: np.ndarray) -> np.ndarray:
    """Return (first, other) of images with equal hashes, int64 ``(n, 2)``: one pair for every repetition."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[inverse]
    repeated = np.flatnonzero(original != np.arange(len(hashes)))
    return np.stack([original[repeated], repeated], axis=1).astype(np.int64)


def near_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Return pairs (first, other) of images that look the same, int64 ``(n, 2)``, sorted.

    Images of one and the same hash are paired with the first of them only, and only the firsts with each
    other: a set in which an image stands ten thousand times has not fifty million pairs.
    """
    values, first = np.unique(hashes, return_index=True)
    same = exact_pairs(hashes)
    close = np.sort(first[near_pairs(values)], axis=1)
    return np.unique(np.concatenate([same[hashes[same[:, 0]] != 0], close]).astype(np.int64), axis=0)


def matches(ours: Hashes, theirs: Hashes) -> list[Match]:
    """Return (our name, their name, ``exact`` or ``near``) of images that stand in both sets, sorted."""
    where: dict[bytes, list[int]] = {}
    for row, value in enumerate(theirs.exact):
        where.setdefault(value.tobytes(), []).append(row)
    shared = np.flatnonzero(np.isin(ours.exact, theirs.exact)).tolist() if where else []
    exact = {(row, other) for row in shared for other in where[ours.exact[row].tobytes()]}
    our_values, their_values = np.unique(ours.near), np.unique(theirs.near)
    pairs = near_pairs(np.concatenate([our_values, their_values]))
    count = len(our_values)
    close = set()
    for a, b in pairs[(pairs[:, 0] < count) & (pairs[:, 1] >= count)]:
        for i in np.flatnonzero(ours.near == our_values[a]):
            close |= {(int(i), int(j)) for j in np.flatnonzero(theirs.near == their_values[b - count])}
    found = [(ours.names[a], theirs.names[b], "exact") for a, b in exact]
    return sorted(found + [(ours.names[a], theirs.names[b], "near") for a, b in close - exact])


def _shared(found: Sequence[Match], name: str = "examples", most: int | None = EXAMPLES) -> dict[str, Any]:
    kinds = Counter(kind for _, _, kind in found)
    return {"exact": kinds["exact"], "near": kinds["near"], name: [list(match) for match in found[:most]]}


def _duplicates(hashes: Hashes) -> list[Match]:
    pairs = [(a, b, "exact") for a, b in sorted(exact_pairs(hashes.exact).tolist())]
    near = near_duplicates(hashes.near).tolist()
    pairs += [(a, b, "near") for a, b in near if hashes.exact[a] != hashes.exact[b]]
    return [(hashes.names[a], hashes.names[b], kind) for a, b, kind in pairs]


def _leaks(hashes: Hashes, folder: Path) -> dict[str, Any]:
    """Return what the set shares with a folder of benchmark images."""
    theirs, unreadable = hash_folder(folder)
    counts = {"folder": str(folder), "pictures": len(theirs.names), "unreadable": unreadable}
    return {**counts, **_shared(matches(hashes, theirs), "matches", None)}


def _histogram(edges: list[float], counts: Counter[str]) -> dict[str, list[float]]:
    return {"edges": edges, "counts": [counts[str(number)] for number in range(len(edges))]}


def _reasons(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted((+counts).items(), key=lambda item: (-item[1], item[0])))


def _counts(seen: int, kept: int, dropped: Counter[str]) -> dict[str, Any]:
    return {"seen": seen, "kept": kept, "dropped": _reasons(dropped)}


def make_report(
    request: PackRequest, result: PackResult, check_against: Path | None = None, train: Path | None = None
) -> dict[str, Any]:
    """Return the report as JSON has it, once the shards and their indexes are in place.

    docs/data.md explains every field. ``check_against`` is a folder of benchmark images that training must
    not have seen; ``train``, for the validation side of a split, that of the training side's shards.
    """
    tally, plan, names = result.tally, result.plan, result.summary["labels"]
    hashes = read_hashes(request.out, result.summary)
    others = read_hashes(train, read_summary(train) or {"shards": []}) if train else None
    labels = Counter({names[int(number)]: count for number, count in tally.labels.items()})
    return {
        "sources": list(request.description),
        "settings": request.settings.to_dict(),
        "pictures": _counts(plan["pictures_seen"], tally.pictures, tally.dropped_pictures),
        "boxes": _counts(plan["boxes_seen"], tally.boxes, tally.dropped_boxes),
        "examples": tally.examples,
        "events": _reasons(tally.events),
        "labels": _reasons(labels),
        "histograms": {name: _histogram(edges, getattr(tally, name)) for name, edges in EDGES.items()},
        "duplicates": _shared(_duplicates(hashes)),
        "check_against": _leaks(hashes, check_against) if check_against else None,
        "also_in_train": _shared(matches(hashes, others)) if others else None,
        "shards": len(result.summary["shards"]),
        "bytes": result.summary["bytes"],
        "seconds": {stage: round(seconds, 3) for stage, seconds in tally.seconds.items()},
    }


def _bins(histogram: dict[str, list[float]]) -> list[tuple[str, int]]:
    """Return the name and the count of every bin."""
    edges = histogram["edges"]
    names = [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]
    return list(zip([*names, f"{edges[-1]:.3g} and more"], map(int, histogram["counts"]), strict=True))


def render(report: dict[str, Any]) -> str:
    """Return the page's HTML."""
    labels = list(report["labels"].items())
    charts = [(title, _bins(report["histograms"][name])) for name, title in CHARTS.items()]
    shown, hidden = labels[:LABELS_SHOWN], len(labels[LABELS_SHOWN:])
    return render_page(TEMPLATE, report=report, charts=charts, labels=shown, hidden=hidden)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write ``report.json`` and ``report.html``; each appears only when it is complete."""
    atomic_write(folder / JSON_NAME, json.dumps(report, indent=1, ensure_ascii=False), sync=True)
    atomic_write(folder / HTML_NAME, render(report), sync=True)
