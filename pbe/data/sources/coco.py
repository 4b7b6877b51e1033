"""COCO's JSON: ``images``, ``annotations`` and ``categories``, read element by element.

Boxes are ``[x, y, width, height]`` in pixels. With ``masks``, ``segmentation`` (polygons or a run-length
code) gives the box and travels along. Several ``images`` entries for one file are one picture with the boxes
of all; an id of several pictures, and sizes that contradict each other, are counted and left out.
"""

from __future__ import annotations

import bisect
import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from pbe.data.sources import scalars
from pbe.data.sources.files import complete, find_pictures
from pbe.data.sources.json_stream import stream_arrays
from pbe.data.sources.names import AMBIGUOUS, AMBIGUOUS_NAME, NameMatcher
from pbe.data.sources.records import (
    AMBIGUOUS_ID,
    BAD_FLAG,
    BAD_NUMBER,
    BAD_SIZE,
    BOX_COLUMNS,
    FLAG_BITS,
    MISSING,
    OTHER_SIZES,
    Annotations,
)
from pbe.errors import UserError

BAD_ENTRY = "entry without id, file name or box"
AMBIGUOUS_CATEGORY = "category with several names"
Size = tuple[int | None, int | None]


class BadEntryError(Exception):
    """An entry is no use; the text is the reason it is counted under."""


@dataclass(slots=True)
class _Image:
    """What ``images`` say of an id: its file, size and licence; ``problem`` is why it cannot be used."""

    name: str
    size: Size
    licence: int
    problem: str = ""


@dataclass
class _Names:
    """Categories or licences by id; a name of None contradicts itself."""

    names: dict[int, str | None] = field(default_factory=dict)

    def add(self, number: int, name: str) -> None:
        """Take a name; a second one that differs leaves none."""
        self.names[number] = name if self.names.get(number, name) == name else None


class _Collector:
    """Columns that grow as the file is read, in compact arrays where there is a row a box.

    Ids are numbered in the order in which they are met, so that any kind of id takes four bytes a box.

    Args:
        masks: keep ``segmentation``; where there is one, the box's numbers are left 0.
    """

    def __init__(self, masks: bool) -> None:
        self.masks = masks
        self.numbers: dict[str, dict[int | str, int]] = {"image": {}, "category": {}, "license": {}}
        self.images: dict[int, _Image] = {}
        self.categories, self.licences = _Names(), _Names()
        self.image_ids, self.category_ids = array("i"), array("i")
        self.boxes, self.flags = array("d"), array("B")
        self.shapes: list[str] = []
        self.dropped_pictures: Counter[str] = Counter()
        self.dropped_boxes: Counter[str] = Counter()

    def number(self, kind: str, value: Any) -> int:
        """Return the number of an id."""
        known = self.numbers[kind]
        try:
            return known.setdefault(scalars.identity(value), len(known))
        except ValueError as error:
            raise BadEntryError(BAD_ENTRY) from error

    def image(self, entry: Any) -> None:
        """Take an element of ``images``, or count that it is none."""
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip() or scalars.text(name) != name:
            raise BadEntryError(BAD_ENTRY)
        number = self.number("image", entry.get("id"))
        licence = entry.get("license")
        size, problem = _size(entry)
        found = _Image(name, size, -1 if licence is None else self.number("license", licence), problem)
        known = self.images.get(number)
        if known is not None and known.name != name:
            known.problem = AMBIGUOUS_ID
            self.dropped_pictures[AMBIGUOUS_ID] += 1
        else:
            self.images[number] = _merged(known, found)

    def annotation(self, entry: Any) -> None:
        """Take an element of ``annotations``, or count that it is none; ``iscrowd`` becomes a flag."""
        if not isinstance(entry, dict):
            raise BadEntryError(BAD_ENTRY)
        shape = entry.get("segmentation") if self.masks else None
        box = entry.get("bbox")
        if not shape and not (isinstance(box, list) and len(box) == 4):
            raise BadEntryError(BAD_ENTRY)
        x, y, width, height = (0.0,) * 4 if shape else map(scalars.number, box or ())
        try:
            crowd = scalars.flag(entry.get("iscrowd"))
        except ValueError as error:
            raise BadEntryError(BAD_FLAG) from error
        category = entry.get("category_id")
        kind = -1 if category is None else self.number("category", category)
        self.image_ids.append(self.number("image", entry.get("image_id")))
        self.category_ids.append(kind)
        self.boxes.extend((x, y, x + width, y + height))
        self.flags.append(FLAG_BITS["is_group_of"] if crowd else 0)
        if self.masks:
            self.shapes.append(json.dumps(shape, separators=(",", ":")) if shape else "")

    def named(self, kind: str, entry: Any, names: _Names) -> None:
        """Add the name of a category or licence; what has none is left out, as boxes need neither."""
        if isinstance(entry, dict):
            names.add(self.number(kind, entry.get("id")), scalars.text(entry.get("name")))

    def read(self, path: Path) -> None:
        """Take every element of the file, in whatever order its arrays stand."""
        for name, entry in stream_arrays(path):
            try:
                if name == "images":
                    self.image(entry)
                elif name == "annotations":
                    self.annotation(entry)
                elif name == "categories":
                    self.named("category", entry, self.categories)
                elif name == "licenses":
                    self.named("license", entry, self.licences)
            except BadEntryError as error:
                if name == "images":
                    self.dropped_pictures[str(error)] += 1
                elif name == "annotations":
                    self.dropped_boxes[str(error)] += 1


def _size(entry: dict[str, Any]) -> tuple[Size, str]:
    """Return the size, and what is wrong with it; half a size says nothing of how the picture was turned."""
    try:
        width, height = scalars.side(entry.get("width")), scalars.side(entry.get("height"))
    except ValueError:
        return (None, None), BAD_SIZE
    return ((width, height) if width and height else (None, None)), ""


def _merged(known: _Image | None, found: _Image) -> _Image:
    """Return one entry for two of the same file."""
    if known is None:
        return found
    sizes = {size for size in (known.size, found.size) if size != (None, None)}
    problem = known.problem or found.problem or (OTHER_SIZES if len(sizes) > 1 else "")
    size = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    return _Image(known.name, size, known.licence if known.licence >= 0 else found.licence, problem)


@dataclass
class _Joined:
    """Which picture each id stands for.

    Attributes:
        rows: of the table of pictures, by number of the id; absent where the id has no picture.
        reasons: why, for ids that are in ``images``; others have no picture.
        entries: what is known of each picture, by row.
        bad: rows that cannot be used, as their entries contradict each other.
    """

    rows: dict[int, int] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    entries: dict[int, _Image] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)


def _join(found: _Collector, matcher: NameMatcher) -> _Joined:
    """Give every id of ``images`` its picture; ``rows`` are those of all files."""
    unclear = {number for number, image in found.images.items() if image.problem == AMBIGUOUS_ID}
    usable = {number: image for number, image in found.images.items() if number not in unclear}
    matched = matcher.match(image.name for image in usable.values())
    joined = _Joined(reasons=dict.fromkeys(unclear, AMBIGUOUS_ID))
    for number, image in usable.items():
        row = matched[image.name]
        if row is None or row == AMBIGUOUS:
            joined.reasons[number] = MISSING if row is None else AMBIGUOUS_NAME
        else:
            joined.rows[number] = row
            joined.entries[row] = _merged(joined.entries.get(row), image)
    joined.bad = {row for row, image in joined.entries.items() if image.problem}
    for number in [number for number, row in joined.rows.items() if row in joined.bad]:
        joined.reasons[number] = joined.entries[joined.rows.pop(number)].problem
    return joined


def _pictures(files: pl.DataFrame, found: _Collector, joined: _Joined) -> pl.DataFrame:
    columns: dict[str, list[Any]] = {"width": [], "height": [], "licence": []}
    for row in range(files.height):
        image = joined.entries.get(row)
        width, height = image.size if image else (None, None)
        columns["width"].append(width)
        columns["height"].append(height)
        columns["licence"].append(found.licences.names.get(image.licence) if image else None)
    kinds = {"width": pl.Int32, "height": pl.Int32, "licence": pl.String}
    stem = pl.col("name").str.replace(r"\.[^.]*$", "")
    known = [pl.Series(name, values, kinds[name]) for name, values in columns.items()]
    good = pl.Series((row not in joined.bad for row in range(files.height)), dtype=pl.Boolean)
    return complete(
        files.select("path", "name", "bytes").with_columns(*known, stem.alias("key")).filter(good)
    )


def _boxes(found: _Collector, joined: _Joined) -> tuple[pl.DataFrame, Counter[str]]:
    """Return the table of boxes whose picture is there, and what was dropped."""
    columns: dict[str, Any] = {"image": pl.Series(found.image_ids, dtype=pl.Int32)}
    for position, name in enumerate(("x1", "y1", "x2", "y2")):
        columns[name] = pl.Series(found.boxes[position::4], dtype=pl.Float64)
    columns["category"] = pl.Series(found.category_ids, dtype=pl.Int32)
    columns["flags"] = pl.Series(found.flags, dtype=pl.UInt8)
    if found.masks:
        columns["mask"] = pl.Series(found.shapes, dtype=pl.String)
    mask = pl.col("mask") if found.masks else pl.lit(None, pl.String)
    reason = _looked_up("image", joined.reasons, pl.String)
    before = sorted(joined.bad)  # rows that the table of pictures leaves out
    rows = {number: row - bisect.bisect(before, row) for number, row in joined.rows.items()}
    contradictory = [number for number, name in found.categories.names.items() if name is None]
    bad_number = (mask.fill_null("") == "") & ~pl.all_horizontal(pl.col("x1", "y1", "x2", "y2").is_finite())
    label = _looked_up("category", found.categories.names, pl.String).fill_null("")
    frame = pl.DataFrame(columns).with_columns(
        _looked_up("image", rows, pl.UInt32).alias("picture"),
        label.cast(pl.Categorical).alias("label"),
        mask.replace("", None).alias("mask"),
    )
    problem = (
        pl.when(pl.col("picture").is_null())
        .then(reason.fill_null(MISSING))
        .when(pl.col("category").is_in(contradictory))
        .then(pl.lit(AMBIGUOUS_CATEGORY))
        .when(bad_number)
        .then(pl.lit(BAD_NUMBER))
    )
    frame = frame.with_columns(problem.alias("problem"))
    lost = frame.filter(pl.col("problem").is_not_null()).group_by("problem").len()
    hollow = [
        pl.when(pl.col("mask").is_null()).then(pl.col(name)).alias(name) for name in ("x1", "y1", "x2", "y2")
    ]
    boxes = frame.filter(pl.col("problem").is_null()).with_columns(hollow).select(list(BOX_COLUMNS))
    return boxes.sort("picture", maintain_order=True), Counter(dict(lost.iter_rows()))


def _looked_up(column: str, table: dict[int, Any], kind: Any) -> pl.Expr:
    known = {number: value for number, value in table.items() if value is not None}
    return pl.col(column).replace_strict(known or {-2: None}, default=None, return_dtype=kind)


def read_coco(path: Path, images: Path, masks: bool = False) -> Annotations:
    """Read a COCO JSON and the pictures it names.

    Args:
        path: the JSON.
        images: the folder that ``file_name`` starts from.
        masks: take ``segmentation`` where given; it then gives the box.

    Raises:
        UserError: the JSON is none, holds no images, or names none of the folder's pictures.
    """
    found = _Collector(masks)
    found.read(path)
    if not found.images and not found.dropped_pictures:
        raise UserError(f"'{path}' holds no 'images'; is it a COCO annotation file?")
    if not found.images:
        raise UserError(f"no entry of 'images' in '{path}' can be used: {_listed(found.dropped_pictures)}")
    files, dropped = find_pictures([images])
    matcher = NameMatcher(files["name"].to_list(), images)
    joined = _join(found, matcher)
    missing = [found.images[number].name for number, reason in joined.reasons.items() if reason == MISSING]
    if missing and not joined.rows:
        raise UserError(f"no picture of the annotations is there: {matcher.explain(missing, path)}")
    dropped += found.dropped_pictures + _dropped_files(found, joined)
    boxes, lost = _boxes(found, joined)
    notes = [matcher.explain(missing, path)] if missing else []
    pictures = _pictures(files, found, joined)
    return Annotations(pictures, boxes, False, +dropped, +(found.dropped_boxes + lost), notes)


def _dropped_files(found: _Collector, joined: _Joined) -> Counter[str]:
    """Count names, not entries, that have no picture."""
    names = {(found.images[number].name, reason) for number, reason in joined.reasons.items()}
    return Counter(reason for _, reason in names)


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())
