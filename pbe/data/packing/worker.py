"""Packing one shard: a task that depends on its part of the plan and on the images, and on nothing else.

The same plan and images give the same bytes, whichever machine runs the task and however often it was
interrupted. The index appears first, then the shard, then the record that the task is done.

The index of a shard, in the format of :mod:`pbe.data.shards.format`, holds for its images in their order
offsets, sizes, keys, boxes and hashes. docs/data.md lists every field.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import polars as pl

from pbe.data.packing.plan import PackSettings, add_examples, box_text, load_task
from pbe.data.samples.decode import TINY
from pbe.data.samples.masks import encode_rle
from pbe.data.shards.format import (
    HASH_BYTES,
    PACK_AGAIN,
    DamagedIndexError,
    ShardWriter,
    digest,
    new_shard,
    read_index,
)
from pbe.data.sources.annotations import DroppedError, Reason, flag_names, pixel_corners
from pbe.data.sources.image_files import (
    ImageHeader,
    UnreadableImageError,
    check_and_hash,
    encode_again,
    inspect_image,
    turn_boxes,
    turn_image,
)
from pbe.data.sources.masks import load_mask, mask_box
from pbe.errors import UserError
from pbe.files import atomic_write

TURNED = "boxes turned with the EXIF orientation"
ON_TRUST = "EXIF orientation: the frame of the boxes was taken on trust"
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

# Of the histograms: bin i is edges[i] <= value < edges[i + 1], the ends are open.
EDGES: dict[str, list[float]] = {
    "area": [round(0.05 * step, 2) for step in range(21)],
    "aspect": [2.0 ** (step / 2) for step in range(-6, 7)],
    "boxes_per_picture": [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 50],
}

Size = tuple[int, int]  # width and height, pixels


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


@dataclass
class Tally:
    """Counts of one shard, or of many; the names are those of the records on the disk."""

    pictures: int = 0  # images kept
    boxes: int = 0  # kept
    dropped_pictures: Counter[str] = field(default_factory=Counter)  # images by reason
    dropped_boxes: Counter[str] = field(default_factory=Counter)  # by reason
    events: Counter[str] = field(default_factory=Counter)  # what happened to images that were kept
    labels: Counter[str] = field(default_factory=Counter)  # boxes kept by label, its number as text
    # What is kept, by bin of EDGES.
    area: Counter[str] = field(default_factory=Counter)  # boxes by share of the image
    aspect: Counter[str] = field(default_factory=Counter)  # boxes by width over height
    boxes_per_picture: Counter[str] = field(default_factory=Counter)  # images
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first that were dropped, by reason
    seconds: dict[str, float] = field(default_factory=dict)  # by stage; they differ from run to run

    def keep(self, boxes: Sequence[KeptBox], size: Size) -> None:
        """Count an image that is kept, with its boxes."""

        def count(name: str, value: float) -> None:
            getattr(self, name)[str(np.searchsorted(EDGES[name][1:], value, "right"))] += 1

        self.pictures += 1
        self.boxes += len(boxes)
        count("boxes_per_picture", len(boxes))
        for box in boxes:
            x1, y1, x2, y2 = box.corners
            self.labels[str(box.label)] += 1
            count("area", (x2 - x1) * (y2 - y1) / (size[0] * size[1]))
            count("aspect", (x2 - x1) / (y2 - y1))

    def drop(self, reason: str, boxes: int, name: str) -> None:
        """Count an image that is dropped with the boxes that it had left."""
        self.dropped_pictures[reason] += 1
        add_examples(self.examples, reason, [name])
        if boxes:
            self.dropped_boxes[f"image dropped: {reason}"] += boxes

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
        """Add the counts of a record."""
        self.pictures += other["pictures"]
        self.boxes += other["boxes"]
        for name, value in vars(self).items():
            if isinstance(value, Counter):
                value.update(other[name])
        for reason, texts in other["examples"].items():
            add_examples(self.examples, reason, texts)
        self.add_seconds(other["seconds"])


class KeptBox(NamedTuple):
    """A box that is kept, in pixels as displayed, with its mask (uint8 ``h w``) if it has one."""

    corners: tuple[float, float, float, float]
    label: int
    flags: frozenset[str]
    mask: np.ndarray | None = None

    def scaled(self, old: Size, new: Size) -> KeptBox:
        """Return a box of an image of the old size as one of the new size."""
        across, down = new[0] / old[0], new[1] / old[1]
        x1, y1, x2, y2 = self.corners
        corners = x1 * across, y1 * down, min(x2 * across, new[0]), min(y2 * down, new[1])
        mask = self.mask
        if mask is not None:
            mask = cv2.resize(mask, new, interpolation=cv2.INTER_NEAREST_EXACT)
        return KeptBox(corners, self.label, self.flags, mask)


class _Packer:
    """Turns images of a plan into members of a shard and rows of its index, counting what happens."""

    def __init__(self, labels: Sequence[str], settings: PackSettings, shard: ShardWriter) -> None:
        self.labels, self.settings, self.shard = labels, settings, shard
        self.tally = Tally()
        self._columns: dict[str, list[Any]] = {name: [] for name in DTYPES}

    def index(self) -> dict[str, np.ndarray]:
        """Return the arrays of the index as they stand in the file."""
        arrays = {name: np.asarray(self._columns[name], kind) for name, kind in DTYPES.items()}
        return arrays | {name: arrays[name].reshape(-1, width) for name, width in WIDTHS.items()}

    def pack_all(self, images: pl.DataFrame, boxes: pl.DataFrame) -> None:
        """Pack some images of the plan, with ``box_end``, and their boxes."""
        rows, start = boxes.to_dicts(), 0
        for row in images.iter_rows(named=True):
            own, start = rows[start : row["box_end"]], row["box_end"]
            before = self.tally.dropped_boxes.total()
            try:
                self._pack(row, own)
            except (DroppedError, UnreadableImageError) as error:
                reason = f"unreadable: {error}" if isinstance(error, UnreadableImageError) else str(error)
                lost = self.tally.dropped_boxes.total() - before
                self.tally.drop(reason, len(own) - lost, row["name"])

    def _pack(self, row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        timed, settings, events = self.tally.timed, self.settings, self.tally.events
        with timed("read"):
            try:
                encoded = Path(row["path"]).read_bytes()
            except OSError as error:
                raise UnreadableImageError(f"cannot be opened ({error.strerror})") from error
        with timed("header"):
            header = inspect_image(encoded)
        if min(header.stored_size) < 2:
            raise DroppedError(TINY)
        turned, on_trust = self._frame(header, (row["width"], row["height"]))
        with timed("boxes"):
            kept = self._boxes(row["name"], rows, header, turned)
        if not kept:
            raise DroppedError(Reason.NO_BOX_LEFT)
        fingerprint = 0
        if settings.perceptual:
            with timed("decode and perceptual hash"):
                fingerprint = check_and_hash(encoded, header)
        size, extension = header.displayed_size, header.extension
        too_long = bool(settings.max_side and max(header.stored_size) > settings.max_side)
        if not extension or header.frames > 1 or too_long:
            with timed("encode again"):
                encoded, extension = encode_again(encoded, header, settings.max_side, settings.quality)
                why = "too long" if header.extension else "a format that shards do not hold"
                events[f"encoded again: {'animated' if header.frames > 1 else why}"] += 1
                old, size = size, inspect_image(encoded).displayed_size
                kept = [box.scaled(old, size) for box in kept] if old != size else kept
        events[TURNED] += turned
        events[ON_TRUST] += on_trust
        with timed("hash and write"):
            annotation = self._annotation(row, size, kept)
            self._write(f"{row['key']}.{extension}", encoded, annotation, size, kept, fingerprint)
            self.tally.keep(kept, size)

    def _frame(self, header: ImageHeader, annotated: tuple[int | None, int | None]) -> tuple[bool, bool]:
        """Return whether boxes have to be turned as EXIF says, and whether that had to be taken on trust."""
        unknown = annotated == (None, None)
        stored, displayed = (
            unknown or annotated == size for size in (header.stored_size, header.displayed_size)
        )
        if not stored and not displayed:
            raise DroppedError(Reason.OTHER_SIZE)
        if header.orientation == 1:
            return False, False
        on_trust = stored and displayed
        return (self.settings.exif_frame == "stored" if on_trust else stored), on_trust

    def _boxes(
        self, name: str, rows: Sequence[dict[str, Any]], header: ImageHeader, turned: bool
    ) -> list[KeptBox]:
        """Return the boxes of an image that are kept, as displayed; the others are counted."""
        kept = []
        for row in rows:
            try:
                kept.append(self._box(row, header, turned))
            except DroppedError as error:
                self.tally.dropped_boxes[str(error)] += 1
                text = box_text(name, row, self.labels[row["label"]])
                add_examples(self.tally.examples, str(error), [text])
        return kept

    def _box(self, row: dict[str, Any], header: ImageHeader, turned: bool) -> KeptBox:
        """Return a box as displayed; ``turned`` says that it was drawn in the stored frame, which differs."""
        size = header.stored_size if turned else header.displayed_size
        mask = None
        if row["mask"]:
            mask, decided = load_mask(row["mask"], *size)
            if decided:
                self.tally.events[f"mask read by {decided}"] += 1
            numbers = mask_box(mask)
        else:
            numbers = pixel_corners(row, size if row["relative"] else (1, 1))
        corners = np.array([numbers], np.float64)
        if not np.isfinite(corners).all():
            raise DroppedError(Reason.BAD_NUMBER)
        if turned:
            corners = turn_boxes(corners, *header.stored_size, header.orientation)
            mask = turn_image(mask, header.orientation) if mask is not None else None
        width, height = header.displayed_size
        x1, y1, x2, y2 = corners[0].tolist()
        if x2 <= x1 or y2 <= y1:
            raise DroppedError(Reason.NO_AREA)
        box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        self._check_box(box[2] - box[0], box[3] - box[1], width * height)
        return KeptBox(box, row["label"], flag_names(row["flags"]), mask)

    def _check_box(self, across: float, down: float, area: int) -> None:
        """Raise a DroppedError for a box, clipped to its image, that the settings do not want."""
        settings = self.settings
        if across <= 0 or down <= 0:
            raise DroppedError(Reason.OUTSIDE)
        if across * down / area < settings.min_area:
            raise DroppedError(Reason.SMALL_AREA)
        if across * down / area > settings.max_area:
            raise DroppedError(Reason.LARGE_AREA)
        if min(across, down) < settings.min_side:
            raise DroppedError(Reason.SHORT_SIDE)
        if settings.max_aspect and max(across, down) > settings.max_aspect * min(across, down):
            raise DroppedError(Reason.ASPECT)

    def _annotation(self, row: dict[str, Any], size: Size, kept: Sequence[KeptBox]) -> bytes:
        boxes = []
        for box in kept:
            fields: dict[str, Any] = {"xyxy": list(box.corners), "label": self.labels[box.label]}
            fields.update(dict.fromkeys(sorted(box.flags), True))
            if box.mask is not None:
                fields["mask"] = encode_rle(box.mask)
            boxes.append(fields)
        told = {name: row[name] for name in ("licence", "author") if row[name]}
        annotation = {"width": size[0], "height": size[1], "boxes": boxes, "source": row["name"], **told}
        return json.dumps(annotation, ensure_ascii=False, separators=(",", ":")).encode()

    def _write(
        self,
        name: str,
        encoded: bytes,
        annotation: bytes,
        size: Size,
        kept: Sequence[KeptBox],
        fingerprint: int,
    ) -> None:
        key, _, extension = name.rpartition(".")
        place, told = self.shard.add(name, encoded), self.shard.add(f"{key}.json", annotation)
        values: dict[str, Any] = {
            "picture_offset": place[0],
            "picture_size": place[1],
            "json_offset": told[0],
            "json_size": told[1],
            "width": size[0],
            "height": size[1],
            "extension": EXTENSIONS.index(extension),
            "key_bytes": key.encode(),
            "boxes": [box.corners for box in kept],
            "labels": [box.label for box in kept],
            "picture_hash": digest(encoded),
            "perceptual_hash": fingerprint,
            "has_mask": [box.mask is not None for box in kept],
        }
        columns = self._columns
        for column, value in values.items():
            columns[column] += value if isinstance(value, list | bytes) else [value]
        columns["key_end"].append(len(columns["key_bytes"]))
        columns["box_end"].append(len(columns["boxes"]))


def part_path(plan: Path, number: int) -> Path:
    """Return the record that shard ``number`` of a plan is done."""
    return plan / f"part-{number:06d}.json"


def pack_shard(plan: Path, out: Path, number: int, labels: Sequence[str], settings: PackSettings) -> int:
    """Pack one shard and record that it is done; returns the number of images of the plan it dealt with.

    The record goes to the folder of the plan. A shard all of whose images are dropped is not written.
    """
    cv2.setNumThreads(1)
    listed: dict[str, Any] | None = None
    with new_shard(out / f"shard-{number:06d}.tar") as shard:
        packer = _Packer(labels, settings, shard)
        packer.pack_all(*load_task(plan, number))
        tally = packer.tally
        if tally.pictures:
            index = shard.write_index(packer.index())
            listed = index | {"pictures": tally.pictures, "boxes": tally.boxes}
    tally.events = +tally.events
    part = {"shard": listed, "tally": vars(tally)}
    atomic_write(part_path(plan, number), json.dumps(part, sort_keys=True), sync=True)
    return tally.pictures + tally.dropped_pictures.total()
