"""The report of a packing: everything that was counted, as JSON and as one HTML page."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbe.data.packing.claim import PackRequest
from pbe.data.packing.duplicates import Hashes, as_void, exact_pairs, hash_folder, matches, near_duplicates
from pbe.data.packing.index import load_index, read_summary, write_whole
from pbe.data.packing.pack import PackResult
from pbe.data.packing.tally import AREA_EDGES, ASPECT_EDGES, COUNT_EDGES
from pbe.html import render_page

TEMPLATE = Path(__file__).with_name("report.html.j2")
JSON_NAME, HTML_NAME = "report.json", "report.html"
EXAMPLES = 200
LABELS_SHOWN = 50
NO_HASHES = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Bar:
    """A row of a chart: what it counts, how many, and the width of its bar, 0 to 1."""

    name: str
    count: int
    width: float


def read_hashes(out: Path, summary: dict[str, Any]) -> Hashes:
    """Return the hashes of all pictures of some shards, out of their indexes."""
    names: list[str] = []
    exact, near = [], []
    for shard in summary["shards"]:
        table = load_index(out / shard["index"])
        names += [table.key(position) for position in range(len(table))]
        exact.append(as_void(table.picture_hash))
        near.append(table.perceptual_hash)
    return Hashes(names, np.concatenate([as_void(b""), *exact]), np.concatenate([NO_HASHES, *near]))


def _histogram(edges: Sequence[float], counts: Counter[str]) -> dict[str, list[float]]:
    """Return the edges and the count of every bin; the last bin is open."""
    return {"edges": list(edges), "counts": [counts[str(number)] for number in range(len(edges))]}


def _duplicates(hashes: Hashes) -> dict[str, Any]:
    exact, near = exact_pairs(hashes.exact), near_duplicates(hashes.near)
    same = {(int(a), int(b)) for a, b in exact}
    close = [(int(a), int(b)) for a, b in near if hashes.exact[a] != hashes.exact[b]]
    shown = [(*pair, "exact") for pair in sorted(same)] + [(*pair, "near") for pair in close]
    return {
        "exact": len(same),
        "near": len(close),
        "examples": [[hashes.names[a], hashes.names[b], kind] for a, b, kind in shown[:EXAMPLES]],
    }


def _leaks(hashes: Hashes, folder: Path) -> dict[str, Any]:
    theirs, unreadable = hash_folder(folder)
    found = matches(hashes, theirs)
    return {
        "folder": str(folder),
        "pictures": len(theirs.names),
        "unreadable": unreadable,
        **_kinds(found),
        "matches": [list(match) for match in found],
    }


def _kinds(found: Sequence[tuple[str, str, str]]) -> dict[str, int]:
    kinds = Counter(kind for _, _, kind in found)
    return {"exact": kinds["exact"], "near": kinds["near"]}


def _also_in(hashes: Hashes, train: Path) -> dict[str, Any]:
    """Return what a validation set shares with its training set although the files have other names."""
    found = matches(hashes, read_hashes(train, read_summary(train) or {"shards": []}))
    return {**_kinds(found), "examples": [list(match) for match in found[:EXAMPLES]]}


def _reasons(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted((+counts).items(), key=lambda item: (-item[1], item[0])))


def make_report(
    request: PackRequest, result: PackResult, check_against: Path | None = None, train: Path | None = None
) -> dict[str, Any]:
    """Return the report as JSON has it; docs/data.md explains every field.

    Args:
        request: of the packing.
        result: of the packing; its shards and their indexes are in place.
        check_against: a folder of benchmark pictures that training must not have seen.
        train: for the validation side of a split, the folder of the training side's shards.
    """
    tally, plan, names = result.tally, result.plan, result.summary["labels"]
    hashes = read_hashes(request.out, result.summary)
    labels = Counter({names[int(number)]: count for number, count in tally.labels.items()})
    return {
        "sources": list(request.description),
        "settings": request.settings.to_dict(),
        "pictures": {
            "seen": plan["pictures_seen"],
            "kept": tally.pictures,
            "dropped": _reasons(tally.dropped_pictures),
        },
        "boxes": {
            "seen": plan["boxes_seen"],
            "kept": tally.boxes,
            "dropped": _reasons(tally.dropped_boxes),
        },
        "examples": tally.examples,
        "events": _reasons(tally.events),
        "labels": _reasons(labels),
        "histograms": {
            "area": _histogram(AREA_EDGES, tally.area),
            "aspect": _histogram(ASPECT_EDGES, tally.aspect),
            "boxes_per_picture": _histogram(COUNT_EDGES, tally.boxes_per_picture),
        },
        "duplicates": _duplicates(hashes),
        "check_against": _leaks(hashes, check_against) if check_against else None,
        "also_in_train": _also_in(hashes, train) if train else None,
        "shards": len(result.summary["shards"]),
        "bytes": result.summary["bytes"],
        "seconds": {stage: round(seconds, 3) for stage, seconds in tally.seconds.items()},
    }


def _bars(counts: dict[str, int]) -> list[Bar]:
    most = max(counts.values(), default=0) or 1
    return [Bar(name, count, count / most) for name, count in counts.items()]


def _histogram_bars(histogram: dict[str, list[float]]) -> list[Bar]:
    edges = histogram["edges"]
    names = [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]
    return _bars(dict(zip([*names, f"{edges[-1]:.3g} and more"], map(int, histogram["counts"]), strict=True)))


def render(report: dict[str, Any]) -> str:
    """Return the page's HTML."""
    charts = [
        ("Boxes kept, by their share of the picture's area", _histogram_bars(report["histograms"]["area"])),
        ("Boxes kept, by width over height", _histogram_bars(report["histograms"]["aspect"])),
        ("Pictures kept, by number of boxes", _histogram_bars(report["histograms"]["boxes_per_picture"])),
    ]
    labels = dict(list(report["labels"].items())[:LABELS_SHOWN])
    return render_page(
        TEMPLATE,
        report=report,
        charts=charts,
        bars=_bars,
        labels=_bars(labels),
        hidden=len(report["labels"]) - len(labels),
    )


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write ``report.json`` and ``report.html``; each appears only when it is complete."""
    text = json.dumps(report, indent=1, ensure_ascii=False)
    write_whole(folder / JSON_NAME, text.encode())
    write_whole(folder / HTML_NAME, render(report).encode())
