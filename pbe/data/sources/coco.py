"""COCO's JSON: ``images``, ``annotations`` and ``categories``, read element by element.

Boxes are ``[x, y, width, height]`` in pixels. With ``masks``, ``segmentation`` (polygons or a run-length
code) gives the box and travels along. Several ``images`` entries for one file are one image with the boxes
of all; an id of several images, and sizes that contradict each other, are counted and left out.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pbe.data.sources import parsing
from pbe.data.sources.annotations import (
    AMBIGUOUS_ID,
    BAD_FLAG,
    BAD_NUMBER,
    BAD_SIZE,
    BOX_COLUMNS,
    CORNERS,
    FLAG_BITS,
    MISSING,
    OTHER_SIZES,
    Annotations,
    complete,
    find_images,
    take_images,
)
from pbe.data.sources.names import AMBIGUOUS, AMBIGUOUS_NAME, NameMatcher
from pbe.errors import UserError

BAD_ENTRY = "entry without id, file name or box"
AMBIGUOUS_CATEGORY = "category with several names"


class BadEntryError(Exception):
    """An entry is no use; the text is the reason it is counted under."""


@dataclass(slots=True)
class _Image:
    """What ``images`` say of an id: its file, size and licence; ``problem`` is why it cannot be used."""

    name: str
    size: tuple[int, int] | None
    licence: int
    problem: str = ""


class _Contents:
    """What the file holds, in compact arrays where there is a row a box.

    Ids are numbered in the order in which they are met, so that any kind of id takes four bytes a box. With
    ``masks``, ``segmentation`` is kept; where there is one, the box's numbers are left 0.
    """

    def __init__(self, masks: bool) -> None:
        self.masks = masks
        self.numbers: dict[str, dict[int | str, int]] = {"image": {}, "category": {}, "license": {}}
        # Names of categories and licences by number; None where entries contradict each other.
        self.names: dict[str, dict[int, str | None]] = {"category": {}, "license": {}}
        self.images: dict[int, _Image] = {}
        self.image_ids, self.category_ids = array("i"), array("i")
        self.boxes, self.flags = array("d"), array("B")
        self.shapes: list[str] = []
        self.dropped_images: Counter[str] = Counter()
        self.dropped_boxes: Counter[str] = Counter()

    def read(self, path: Path) -> None:
        """Take every element of the file, in whatever order its arrays stand."""
        for array_name, entry in parsing.stream_arrays(path):
            try:
                if array_name == "images":
                    self._add_image(entry)
                elif array_name == "annotations":
                    self._add_box(entry)
                elif array_name in ("categories", "licenses") and isinstance(entry, dict):
                    self._add_name("category" if array_name == "categories" else "license", entry)
            except BadEntryError as error:
                if array_name == "images":
                    self.dropped_images[str(error)] += 1
                elif array_name == "annotations":
                    self.dropped_boxes[str(error)] += 1

    def _number(self, kind: str, value: Any) -> int:
        known = self.numbers[kind]
        try:
            return known.setdefault(parsing.identity(value), len(known))
        except ValueError as error:
            raise BadEntryError(BAD_ENTRY) from error

    def _add_image(self, entry: Any) -> None:
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip() or parsing.text(name) != name:
            raise BadEntryError(BAD_ENTRY)
        number = self._number("image", entry.get("id"))
        licence = entry.get("license")
        found = _Image(name, None, -1 if licence is None else self._number("license", licence))
        try:
            width, height = parsing.side(entry.get("width")), parsing.side(entry.get("height"))
            # Half a size says nothing of how the image was turned.
            found.size = (width, height) if width and height else None
        except ValueError:
            found.problem = BAD_SIZE
        known = self.images.get(number)
        if known is not None and known.name != name:
            known.problem = AMBIGUOUS_ID
            self.dropped_images[AMBIGUOUS_ID] += 1
        else:
            self.images[number] = _merged(known, found)

    def _add_box(self, entry: Any) -> None:
        if not isinstance(entry, dict):
            raise BadEntryError(BAD_ENTRY)
        shape = entry.get("segmentation") if self.masks else None
        box = entry.get("bbox")
        if not shape and not (isinstance(box, list) and len(box) == 4):
            raise BadEntryError(BAD_ENTRY)
        x, y, width, height = (0.0,) * 4 if shape else map(parsing.number, box or ())
        try:
            crowd = parsing.flag(entry.get("iscrowd"))
        except ValueError as error:
            raise BadEntryError(BAD_FLAG) from error
        category = entry.get("category_id")
        kind = -1 if category is None else self._number("category", category)
        self.image_ids.append(self._number("image", entry.get("image_id")))
        self.category_ids.append(kind)
        self.boxes.extend((x, y, x + width, y + height))
        self.flags.append(FLAG_BITS["is_group_of"] if crowd else 0)
        if self.masks:
            self.shapes.append(json.dumps(shape, separators=(",", ":")) if shape else "")

    def _add_name(self, kind: str, entry: dict[str, Any]) -> None:
        number, name = self._number(kind, entry.get("id")), parsing.text(entry.get("name"))
        names = self.names[kind]
        names[number] = name if names.get(number, name) == name else None


def _merged(known: _Image | None, found: _Image) -> _Image:
    """Return one entry for two of the same file."""
    if known is None:
        return found
    sizes = {known.size, found.size} - {None}
    problem = known.problem or found.problem or (OTHER_SIZES if len(sizes) > 1 else "")
    size = next(iter(sizes)) if len(sizes) == 1 else None
    return _Image(known.name, size, known.licence if known.licence >= 0 else found.licence, problem)


def _join(found: _Contents, matcher: NameMatcher) -> tuple[dict[int, int], dict[int, str], dict[int, _Image]]:
    """Return the row of each id's file, why others in ``images`` have none, and what is known of each row."""
    unclear = [number for number, image in found.images.items() if image.problem == AMBIGUOUS_ID]
    reasons = dict.fromkeys(unclear, AMBIGUOUS_ID)
    usable = {number: image for number, image in found.images.items() if number not in reasons}
    matched = matcher.match(image.name for image in usable.values())
    rows: dict[int, int] = {}
    entries: dict[int, _Image] = {}
    for number, image in usable.items():
        row = matched[image.name]
        if row is None or row == AMBIGUOUS:
            reasons[number] = MISSING if row is None else AMBIGUOUS_NAME
        else:
            rows[number] = row
            entries[row] = _merged(entries.get(row), image)
    reasons |= {number: entries[row].problem for number, row in rows.items() if entries[row].problem}
    return {number: row for number, row in rows.items() if number not in reasons}, reasons, entries


def _boxes(
    found: _Contents, rows: dict[int, int], reasons: dict[int, str]
) -> tuple[pl.DataFrame, Counter[str]]:
    """Return the table of boxes whose image is there, sorted by image, and what was dropped."""
    columns: dict[str, Any] = {
        "id": pl.Series(found.image_ids, dtype=pl.Int32),
        "category": pl.Series(found.category_ids, dtype=pl.Int32),
        "flags": pl.Series(found.flags, dtype=pl.UInt8),
    }
    if found.masks:
        columns["mask"] = pl.Series(found.shapes, dtype=pl.String)
    for position, name in enumerate(CORNERS):
        columns[name] = pl.Series(found.boxes[position::4], dtype=pl.Float64)
    names = found.names["category"]
    mask = pl.col("mask").replace("", None) if found.masks else pl.lit(None, pl.String)
    frame = pl.DataFrame(columns).with_columns(
        _looked_up("id", rows, pl.UInt32).alias("image"),
        _looked_up("category", names, pl.String).fill_null("").cast(pl.Categorical).alias("label"),
        mask.alias("mask"),
    )
    contradictory = [number for number, name in names.items() if name is None]
    drawn = pl.col("mask").is_null()
    problem = (
        pl.when(pl.col("image").is_null())
        .then(_looked_up("id", reasons, pl.String).fill_null(MISSING))
        .when(pl.col("category").is_in(contradictory))
        .then(pl.lit(AMBIGUOUS_CATEGORY))
        .when(drawn & ~pl.all_horizontal(pl.col(*CORNERS).is_finite()))
        .then(pl.lit(BAD_NUMBER))
    )
    frame = frame.with_columns(problem.alias("problem"))
    lost = frame.filter(pl.col("problem").is_not_null()).group_by("problem").len()
    corners = [pl.when(drawn).then(pl.col(name)).alias(name) for name in CORNERS]
    boxes = frame.filter(pl.col("problem").is_null()).with_columns(corners).select(list(BOX_COLUMNS))
    return boxes, Counter(dict(lost.iter_rows()))


def _looked_up(column: str, table: dict[int, Any], kind: Any) -> pl.Expr:
    known = {number: value for number, value in table.items() if value is not None}
    return pl.col(column).replace_strict(known or {-2: None}, default=None, return_dtype=kind)


def read_coco(path: Path, images: Path, masks: bool = False) -> Annotations:
    """Read a COCO JSON and the images it names.

    Args:
        path: the JSON.
        images: the folder that ``file_name`` starts from.
        masks: take ``segmentation`` where given; it then gives the box.
    """
    found = _Contents(masks)
    found.read(path)
    if not found.images and not found.dropped_images:
        raise UserError(f"'{path}' holds no 'images'; is it a COCO annotation file?")
    if not found.images:
        listed = ", ".join(f"{count} {reason}" for reason, count in found.dropped_images.items())
        raise UserError(f"no entry of 'images' in '{path}' can be used: {listed}")
    files, dropped = find_images([images])
    matcher = NameMatcher(files["name"].to_list(), images)
    rows, reasons, entries = _join(found, matcher)
    missing = [found.images[number].name for number, reason in reasons.items() if reason == MISSING]
    if missing and not rows:
        raise UserError(f"no image of the annotations is there: {matcher.explain(missing, path)}")
    # Names are counted, not entries.
    lost_names = {(found.images[number].name, reason) for number, reason in reasons.items()}
    dropped += found.dropped_images + Counter(reason for _, reason in lost_names)
    licences = found.names["license"]
    sized = {row: image.size for row, image in entries.items() if image.size}
    table = complete(
        files.select("path", "name", "bytes", pl.col("name").str.replace(r"\.[^.]*$", "").alias("key")),
        width={row: size[0] for row, size in sized.items()},
        height={row: size[1] for row, size in sized.items()},
        licence={row: licences.get(image.licence) for row, image in entries.items()},
    )
    good = [row for row in range(table.height) if row not in entries or not entries[row].problem]
    boxes, lost = _boxes(found, rows, reasons)
    table, boxes = take_images(table, boxes, np.array(good, np.int64))
    notes = [matcher.explain(missing, path)] if missing else []
    return Annotations(table, boxes, False, +dropped, +(found.dropped_boxes + lost), notes)
