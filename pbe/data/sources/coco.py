"""COCO's JSON: ``images``, ``annotations`` and ``categories``, read element by element.

Boxes are ``[x, y, width, height]`` in pixels. With ``masks``, ``segmentation`` (polygons or a run-length
code) gives the box and travels along. Several ``images`` entries for one file are one image with the boxes
of all; an id of several images, and sizes that contradict each other, are counted and left out.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pbe.data.sources import parsing
from pbe.data.sources.annotations import (
    BOX_COLUMNS,
    CORNERS,
    FLAG_BITS,
    Annotations,
    DroppedError,
    Reason,
    drop_images,
    find_images,
    with_known,
)
from pbe.data.sources.names import AMBIGUOUS, NameMatcher
from pbe.errors import UserError


@dataclass(slots=True)
class _Image:
    """What ``images`` say of an id: its file, size and licence; ``problem`` is why it cannot be used."""

    name: str
    size: tuple[int, int] | None
    licence: int | None
    problem: str = ""

    def merged(self, other: _Image) -> _Image:
        """Return one entry for two of the same file."""
        sizes = {self.size, other.size} - {None}
        problem = self.problem or other.problem or (Reason.OTHER_SIZES if len(sizes) > 1 else "")
        licence = other.licence if self.licence is None else self.licence
        return _Image(self.name, sizes.pop() if len(sizes) == 1 else None, licence, problem)


class _Contents:
    """What the file holds, in compact arrays where there is a row a box.

    Ids are numbered in the order in which they are met, so that any kind of id takes four bytes a box. With
    ``masks``, ``segmentation`` is kept; where there is one, the box's numbers are left 0.
    """

    def __init__(self, masks: bool) -> None:
        self.masks = masks
        self.numbers: dict[str, dict[int | str | None, int]] = {"image": {}, "category": {}, "license": {}}
        # Names of categories and licences by number; None where entries contradict each other.
        self.names: dict[str, dict[int, str | None]] = {"category": {}, "license": {}}
        self.images: dict[int, _Image] = {}
        self.image_ids, self.category_ids = array("I"), array("I")
        self.boxes, self.flags = array("d"), array("B")
        self.shapes: list[str | None] = []
        self.dropped = {name: Counter[str]() for name in ("images", "annotations", "categories", "licenses")}

    def read(self, path: Path) -> None:
        """Take every element of the file, in whatever order its arrays stand."""
        for name, entry in parsing.stream_arrays(path):
            if name not in self.dropped:
                continue
            try:
                if not isinstance(entry, dict):
                    raise DroppedError(Reason.BAD_ENTRY)
                if name == "images":
                    self._add_image(entry)
                elif name == "annotations":
                    self._add_box(entry)
                else:
                    self._add_name("category" if name == "categories" else "license", entry)
            except DroppedError as error:
                self.dropped[name][str(error)] += 1

    def _number(self, kind: str, value: Any, optional: bool = False) -> int:
        known = self.numbers[kind]
        return known.setdefault(None if optional and value is None else parsing.identity(value), len(known))

    def _add_image(self, entry: dict[str, Any]) -> None:
        name = entry.get("file_name")
        if not isinstance(name, str) or not name.strip() or parsing.text(name) != name:
            raise DroppedError(Reason.BAD_ENTRY)
        number = self._number("image", entry.get("id"))
        licence = entry.get("license")
        found = _Image(name, None, None if licence is None else self._number("license", licence))
        try:
            width, height = parsing.side(entry.get("width")), parsing.side(entry.get("height"))
            # Half a size says nothing of how the image was turned.
            found.size = (width, height) if width and height else None
        except DroppedError as error:
            found.problem = str(error)
        known = self.images.get(number)
        if known is not None and known.name != name:
            known.problem = Reason.AMBIGUOUS_ID
            raise DroppedError(Reason.AMBIGUOUS_ID)
        self.images[number] = known.merged(found) if known else found

    def _add_box(self, entry: dict[str, Any]) -> None:
        shape, box = entry.get("segmentation") if self.masks else None, entry.get("bbox")
        if not shape and not (isinstance(box, list) and len(box) == 4):
            raise DroppedError(Reason.BAD_ENTRY)
        x, y, width, height = (0.0,) * 4 if shape else map(parsing.number, box or ())
        crowd = parsing.flag(entry.get("iscrowd"))
        category = self._number("category", entry.get("category_id"), optional=True)
        self.image_ids.append(self._number("image", entry.get("image_id")))
        self.category_ids.append(category)
        self.boxes.extend((x, y, x + width, y + height))
        self.flags.append(FLAG_BITS["is_group_of"] if crowd else 0)
        if self.masks:
            self.shapes.append(json.dumps(shape, separators=(",", ":")) if shape else None)

    def _add_name(self, kind: str, entry: dict[str, Any]) -> None:
        number, name = self._number(kind, entry.get("id")), parsing.text(entry.get("name"))
        names = self.names[kind]
        names[number] = name if names.get(number, name) == name else None


def _join(found: _Contents, matcher: NameMatcher) -> tuple[dict[int, int], dict[int, str], dict[int, _Image]]:
    """Return the row of each id's file, why others in ``images`` have none, and what is known of each row."""
    reasons: dict[int, str] = {}
    usable = {}
    for number, image in found.images.items():
        if image.problem == Reason.AMBIGUOUS_ID:
            reasons[number] = image.problem
        else:
            usable[number] = image
    matched = matcher.match(image.name for image in usable.values())
    rows: dict[int, int] = {}
    entries: dict[int, _Image] = {}
    for number, image in usable.items():
        row = matched[image.name]
        if row is None or row == AMBIGUOUS:
            reasons[number] = Reason.MISSING if row is None else Reason.AMBIGUOUS_NAME
        else:
            rows[number] = row
            entries[row] = entries[row].merged(image) if row in entries else image
    reasons |= {number: entries[row].problem for number, row in rows.items() if entries[row].problem}
    return {number: row for number, row in rows.items() if number not in reasons}, reasons, entries


def _boxes(
    found: _Contents, rows: dict[int, int], reasons: dict[int, str]
) -> tuple[pl.DataFrame, Counter[str]]:
    """Return the table of boxes whose image is there, sorted by image, and what was dropped."""

    def looked_up(kind: str, numbers: array[int], values: Mapping[int, Any], dtype: Any) -> pl.Series:
        table = [values.get(number) for number in range(len(found.numbers[kind]))]
        return pl.Series(table, dtype=dtype).gather(pl.Series(numbers, dtype=pl.UInt32))

    names = found.names["category"]
    unnamed = set(found.numbers["image"].values()) - rows.keys()
    unplaced = {number: reasons.get(number, Reason.MISSING) for number in unnamed}
    twice = {number: Reason.AMBIGUOUS_CATEGORY for number, name in names.items() if name is None}
    labels = {number: names.get(number) or "" for number in found.numbers["category"].values()}
    drawn = pl.col("mask").is_null()
    finite = pl.all_horizontal(pl.col(*CORNERS).is_finite())
    masks = pl.Series(found.shapes, dtype=pl.String) if found.masks else pl.lit(None, pl.String)
    corners = {name: pl.Series(found.boxes[place::4], dtype=pl.Float64) for place, name in enumerate(CORNERS)}
    frame = pl.DataFrame(corners).with_columns(
        flags=pl.Series(found.flags, dtype=pl.UInt8),
        image=looked_up("image", found.image_ids, rows, pl.UInt32),
        unplaced=looked_up("image", found.image_ids, unplaced, pl.String),
        label=looked_up("category", found.category_ids, labels, pl.Categorical),
        twice=looked_up("category", found.category_ids, twice, pl.String),
        mask=masks,
    )
    odd = pl.when(drawn & ~finite).then(pl.lit(Reason.BAD_NUMBER))
    frame = frame.with_columns(problem=pl.coalesce("unplaced", "twice", odd))
    lost = frame.filter(pl.col("problem").is_not_null()).group_by("problem", maintain_order=True).len()
    known = [pl.when(drawn).then(pl.col(name)).alias(name) for name in CORNERS]
    boxes = frame.filter(pl.col("problem").is_null()).with_columns(known).select(list(BOX_COLUMNS))
    return boxes, Counter(dict(lost.iter_rows()))


def read_coco(path: Path, images: Path, masks: bool = False) -> Annotations:
    """Read a COCO JSON and the images it names, whose ``file_name`` starts from the folder ``images``."""
    found = _Contents(masks)
    found.read(path)
    unusable = found.dropped["images"]
    if not found.images and not unusable:
        raise UserError(f"'{path}' holds no 'images'; is it a COCO annotation file?")
    if not found.images:
        listed = ", ".join(f"{count} {reason}" for reason, count in unusable.items())
        raise UserError(f"no entry of 'images' in '{path}' can be used: {listed}")
    files, dropped = find_images([images])
    matcher = NameMatcher(files["name"].to_list(), images)
    rows, reasons, entries = _join(found, matcher)
    missing = [found.images[number].name for number, reason in reasons.items() if reason == Reason.MISSING]
    if missing and not rows:
        raise UserError(f"no image of the annotations is there: {matcher.explain(missing, path)}")
    # Names are counted, not entries.
    lost_names = {(found.images[number].name, reason) for number, reason in reasons.items()}
    dropped += unusable + Counter(reason for _, reason in lost_names)
    names = found.names["license"]
    licences = {row: names.get(image.licence) for row, image in entries.items() if image.licence is not None}
    files = files.with_columns(pl.col("name").str.replace(r"\.[^.]*$", "").alias("key"))
    table = with_known(files, {row: image.size for row, image in entries.items() if image.size}, licences)
    boxes, lost = _boxes(found, rows, reasons)
    bad = [row for row, image in entries.items() if image.problem]
    table, boxes = drop_images(table, boxes, bad)
    notes = [matcher.explain(missing, path)] if missing else []
    return Annotations(table, boxes, False, +dropped, +(found.dropped["annotations"] + lost), notes)
