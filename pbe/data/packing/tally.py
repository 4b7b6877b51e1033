"""What is counted while a shard is packed; tallies of shards add up to the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

AREA_EDGES = [round(0.05 * step, 2) for step in range(21)]
ASPECT_EDGES = [2.0 ** (step / 2) for step in range(-6, 7)]
COUNT_EDGES = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 50]
EXAMPLES = 5  # of each reason
COUNTERS = ("dropped_pictures", "dropped_boxes", "events", "labels")


def bin_of(edges: Sequence[float], value: float) -> int:
    """Return the bin of ``value``; bin i is ``edges[i] <= value < edges[i + 1]``, the ends are open."""
    last = len(edges) - 1
    return min(max(int(np.searchsorted(edges, value, "right")) - 1, 0), last)


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
    """Counts of one shard, or of many.

    Attributes:
        pictures: kept.
        boxes: kept.
        dropped_pictures: by reason.
        dropped_boxes: by reason.
        events: what happened to pictures that were kept.
        labels: boxes kept by label, its number as text.
        area: boxes kept by their share of the picture, bins of :data:`AREA_EDGES`.
        aspect: boxes kept by width over height, bins of :data:`ASPECT_EDGES`.
        boxes_per_picture: pictures kept by number of boxes, bins of :data:`COUNT_EDGES`.
        examples: by reason, the first images or boxes that were dropped for it.
        seconds: by stage; the only part that differs from run to run.
    """

    pictures: int = 0
    boxes: int = 0
    dropped_pictures: Counter[str] = field(default_factory=Counter)
    dropped_boxes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    area: Counter[str] = field(default_factory=Counter)
    aspect: Counter[str] = field(default_factory=Counter)
    boxes_per_picture: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def keep(self, boxes: np.ndarray, labels: Sequence[int], width: int, height: int) -> None:
        """Count a picture that is kept, with its boxes, ``n 4``."""
        self.pictures += 1
        self.boxes += len(boxes)
        self.boxes_per_picture[str(bin_of(COUNT_EDGES, len(boxes)))] += 1
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels, strict=True):
            self.labels[str(label)] += 1
            self.area[str(bin_of(AREA_EDGES, (x2 - x1) * (y2 - y1) / (width * height)))] += 1
            self.aspect[str(bin_of(ASPECT_EDGES, (x2 - x1) / (y2 - y1)))] += 1

    def drop(self, reason: str, boxes: int, name: str) -> None:
        """Count a picture that is dropped with the boxes that it had left."""
        self.dropped_pictures[reason] += 1
        add_examples(self.examples, {reason: [name]})
        if boxes:
            self.dropped_boxes[f"image dropped: {reason}"] += boxes

    def drop_box(self, reason: str, text: str) -> None:
        """Count a box that is dropped."""
        self.dropped_boxes[reason] += 1
        add_examples(self.examples, {reason: [text]})

    def spend(self, stage: str, seconds: float) -> None:
        """Add to the time of a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def add(self, other: dict[str, Any]) -> None:
        """Add what :meth:`to_dict` of another returned."""
        self.pictures += other["pictures"]
        self.boxes += other["boxes"]
        for name in (*COUNTERS, "area", "aspect", "boxes_per_picture"):
            getattr(self, name).update(other[name])
        add_examples(self.examples, other["examples"])
        self.add_seconds(other["seconds"])

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add times by stage."""
        for stage, spent in seconds.items():
            self.spend(stage, spent)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON has them."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
