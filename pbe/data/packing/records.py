"""What packing writes beside the shards, in the format of :mod:`pbe.data.shards.format`, and its counts.

The index of a shard holds, for its images in their order, offsets, sizes, keys, boxes and hashes.
docs/data.md lists every field.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pbe.data.shards.format import (
    HASH_BYTES,
    MANIFEST_NAME,
    PACK_AGAIN,
    DamagedIndexError,
    load_manifest,
    read_index,
)
from pbe.errors import UserError
from pbe.files import atomic_write

EXTENSIONS = ("jpg", "png", "webp")
# The arrays of an index, in the order of the file: of n images and m boxes. Ends count what lies before them.
DTYPES: dict[str, Any] = {
    "picture_offset": np.int64,  # n: where the encoded image starts in the tar
    "picture_size": np.int64,  # n: bytes
    "json_offset": np.int64,  # n
    "json_size": np.int64,  # n
    "width": np.int32,  # n: pixels as displayed
    "height": np.int32,  # n
    "extension": np.uint8,  # n: positions in EXTENSIONS
    "key_bytes": np.uint8,  # UTF-8 keys one after another
    "key_end": np.int64,  # n
    "box_end": np.int64,  # n
    "boxes": np.float64,  # m 4: x1 y1 x2 y2 in pixels, x2 and y2 exclusive
    "labels": np.int32,  # m: positions in the labels of shards.json
    "picture_hash": np.uint8,  # n 16: of the encoded image
    "perceptual_hash": np.uint64,  # n; 0 where there is none
    "has_mask": np.bool_,  # m: the JSON member holds the box's mask
}
WIDTHS = {"boxes": 4, "picture_hash": HASH_BYTES}  # of arrays of two dimensions

AREA_EDGES = [round(0.05 * step, 2) for step in range(21)]
ASPECT_EDGES = [2.0 ** (step / 2) for step in range(-6, 7)]
COUNT_EDGES = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 50]
EXAMPLES = 5  # of each reason


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that appears under its name only when it is complete and on the disk."""
    atomic_write(path, content, sync=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file that packing keeps for itself."""
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        problem = "no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
    raise UserError(f"'{path}' is damaged ({problem}); start anew with --overwrite")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return what ``shards.json`` of a folder holds, or None where there is none."""
    path = folder / MANIFEST_NAME
    try:
        return load_manifest(path.read_bytes(), path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}); {PACK_AGAIN}") from error


def load_index(source: Path | bytes) -> dict[str, np.ndarray]:
    """Read the arrays of :data:`DTYPES` from the index of one shard, a file or the file's bytes."""
    try:
        return read_index(source, DTYPES)
    except DamagedIndexError as error:
        raise UserError(f"{error}; {PACK_AGAIN}") from error


def index_keys(index: Mapping[str, np.ndarray]) -> list[str]:
    """Return the keys of the images of an index."""
    joined, ends = index["key_bytes"].tobytes(), index["key_end"].tolist()
    return [joined[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


class IndexBuilder:
    """The arrays of an index, filled image by image."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in DTYPES}

    def add(self, **values: Any) -> None:
        """Add an image: its value in every array but the ends; lists and bytes are several."""
        for name, value in values.items():
            self.columns[name] += value if isinstance(value, list | bytes) else [value]
        self.columns["key_end"].append(len(self.columns["key_bytes"]))
        self.columns["box_end"].append(len(self.columns["boxes"]))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays as they stand in the file."""
        arrays = {name: np.asarray(self.columns[name], kind) for name, kind in DTYPES.items()}
        return arrays | {name: arrays[name].reshape(-1, width) for name, width in WIDTHS.items()}


def bin_of(edges: Sequence[float], value: float) -> str:
    """Return the bin of ``value``; bin i is ``edges[i] <= value < edges[i + 1]``, the ends are open."""
    last = len(edges) - 1
    return str(min(max(int(np.searchsorted(edges, value, "right")) - 1, 0), last))


def add_examples(known: dict[str, list[str]], more: Mapping[str, Sequence[str]]) -> None:
    """Add examples by reason to those that are known, up to :data:`EXAMPLES` of each."""
    for reason, texts in more.items():
        known[reason] = [*known.get(reason, []), *texts][:EXAMPLES]


def box_text(name: str, row: Mapping[str, Any], label: str | None) -> str:
    """Return a box as an example shows it: its image, its corners as the source gives them, its label."""
    corners = " ".join("?" if row[side] is None else f"{row[side]:g}" for side in ("x1", "y1", "x2", "y2"))
    return f"{name}: {'mask' if row['mask'] else corners} {label or ''}".rstrip()


@dataclass
class Tally:
    """Counts of one shard, or of many; the names are those of the records on the disk."""

    pictures: int = 0  # images kept
    boxes: int = 0  # kept
    dropped_pictures: Counter[str] = field(default_factory=Counter)  # images by reason
    dropped_boxes: Counter[str] = field(default_factory=Counter)  # by reason
    events: Counter[str] = field(default_factory=Counter)  # what happened to images that were kept
    labels: Counter[str] = field(default_factory=Counter)  # boxes kept by label, its number as text
    area: Counter[str] = field(default_factory=Counter)  # boxes kept by share of the image: AREA_EDGES
    aspect: Counter[str] = field(default_factory=Counter)  # boxes kept by width over height: ASPECT_EDGES
    boxes_per_picture: Counter[str] = field(default_factory=Counter)  # images kept: COUNT_EDGES
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first that were dropped, by reason
    seconds: dict[str, float] = field(default_factory=dict)  # by stage; they differ from run to run

    def keep(self, boxes: np.ndarray, labels: Sequence[int], width: int, height: int) -> None:
        """Count an image that is kept, with its boxes, ``n 4``."""
        self.pictures += 1
        self.boxes += len(boxes)
        self.boxes_per_picture[bin_of(COUNT_EDGES, len(boxes))] += 1
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels, strict=True):
            self.labels[str(label)] += 1
            self.area[bin_of(AREA_EDGES, (x2 - x1) * (y2 - y1) / (width * height))] += 1
            self.aspect[bin_of(ASPECT_EDGES, (x2 - x1) / (y2 - y1))] += 1

    def drop(self, reason: str, boxes: int, name: str) -> None:
        """Count an image that is dropped with the boxes that it had left."""
        self.dropped_pictures[reason] += 1
        add_examples(self.examples, {reason: [name]})
        if boxes:
            self.dropped_boxes[f"image dropped: {reason}"] += boxes

    def drop_box(self, reason: str, text: str) -> None:
        """Count a box that is dropped."""
        self.dropped_boxes[reason] += 1
        add_examples(self.examples, {reason: [text]})

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the ``with`` block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds({stage: time.perf_counter() - start})

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add times by stage."""
        for stage, spent in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def add(self, other: dict[str, Any]) -> None:
        """Add what :meth:`to_dict` of another returned."""
        self.pictures += other["pictures"]
        self.boxes += other["boxes"]
        for name, value in vars(self).items():
            if isinstance(value, Counter):
                value.update(other[name])
        add_examples(self.examples, other["examples"])
        self.add_seconds(other["seconds"])

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON has them."""
        return dict(vars(self))
