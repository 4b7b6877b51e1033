"""COCO's JSON: ``images``, ``annotations`` and ``categories``, read element by element.

Boxes are ``[x, y, width, height]`` in pixels. With ``masks``, ``segmentation`` (polygons or a run-length
code) gives the box and travels along.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from pbe.data.sources.files import complete, find_pictures
from pbe.data.sources.json_stream import stream_arrays
from pbe.data.sources.records import BAD_NUMBER, BOX_COLUMNS, FLAG_BITS, MISSING, Annotations
from pbe.errors import UserError

BAD_ENTRY = "entry without id, file name or box"


class _Collector:
    """Columns that grow as the file is read, in compact arrays where there is a row a box.

    Args:
        masks: keep ``segmentation``; where there is one, the box's numbers are left 0.
    """

    def __init__(self, masks: bool) -> None:
        self.masks = masks
        self.images: list[tuple[int, str, int | None, int | None, int | None]] = []
        self.categories: dict[int, str] = {}
        self.licences: dict[int, str] = {}
        self.image_ids, self.category_ids = array("q"), array("q")
        self.boxes, self.flags = array("d"), array("B")
        self.shapes: list[str] = []
        self.dropped_pictures: Counter[str] = Counter()
        self.dropped_boxes: Counter[str] = Counter()

    def image(self, entry: Any) -> None:
        """Take an element of ``images``, or count that it is none."""
        try:
            size = [int(entry[side]) if entry.get(side) else None for side in ("width", "height")]
            licence = entry.get("license")
            row = (
                int(entry["id"]),
                str(entry["file_name"]),
                *size,
                None if licence is None else int(licence),
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            self.dropped_pictures[BAD_ENTRY] += 1
            return
        self.images.append(row)  # type: ignore[arg-type]

    def annotation(self, entry: Any) -> None:
        """Take an element of ``annotations``, or count that it is none; ``iscrowd`` becomes a flag."""
        try:
            shape = entry.get("segmentation") if self.masks else None
            box = entry.get("bbox") or ()
            if not shape and len(box) != 4:
                raise KeyError("bbox")
            x, y, width, height = (float(value) for value in box) if not shape else (0.0, 0.0, 0.0, 0.0)
            image, category = int(entry["image_id"]), int(entry.get("category_id") or 0)
            crowd = bool(entry.get("iscrowd"))
        except (AttributeError, KeyError, TypeError, ValueError):
            self.dropped_boxes[BAD_ENTRY] += 1
            return
        self.image_ids.append(image)
        self.category_ids.append(category)
        self.boxes.extend((x, y, x + width, y + height))
        self.flags.append(FLAG_BITS["is_group_of"] if crowd else 0)
        if self.masks:
            self.shapes.append(json.dumps(shape, separators=(",", ":")) if shape else "")

    def named(self, entry: Any, names: dict[int, str]) -> None:
        """Add the name of a category or licence; what has none is left out, as boxes need neither."""
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            names[entry["id"]] = str(entry.get("name", ""))

    def read(self, path: Path) -> None:
        """Take every element of the file, in whatever order its arrays stand."""
        for name, entry in stream_arrays(path):
            if name == "images":
                self.image(entry)
            elif name == "annotations":
                self.annotation(entry)
            elif name == "categories":
                self.named(entry, self.categories)
            elif name == "licenses":
                self.named(entry, self.licences)


def _box_frame(found: _Collector) -> pl.DataFrame:
    """Return the table of boxes, with ``image_id`` instead of ``picture``."""
    columns: dict[str, Any] = {"image_id": pl.Series(found.image_ids, dtype=pl.Int64)}
    for position, name in enumerate(("x1", "y1", "x2", "y2")):
        columns[name] = pl.Series(found.boxes[position::4], dtype=pl.Float64)
    columns["category"] = pl.Series(found.category_ids, dtype=pl.Int64)
    columns["flags"] = pl.Series(found.flags, dtype=pl.UInt8)
    columns["mask"] = pl.Series(found.shapes, dtype=pl.String) if found.masks else None
    frame = pl.DataFrame(columns).with_columns(pl.col("mask").cast(pl.String))
    label = pl.col("category").replace_strict(found.categories or {0: ""}, default="", return_dtype=pl.String)
    return frame.with_columns(label.cast(pl.Categorical).alias("label"))


def _join_pictures(found: _Collector, folder: Path) -> tuple[pl.DataFrame, Counter[str]]:
    """Return the table of pictures that exist, with ``image_id``, and what was dropped."""
    files, dropped = find_pictures([folder])
    schema = {
        "image_id": pl.Int64,
        "file": pl.String,
        "width": pl.Int32,
        "height": pl.Int32,
        "terms": pl.Int64,
    }
    entries = pl.DataFrame(found.images, schema=schema, orient="row").unique(
        "image_id", keep="first", maintain_order=True
    )
    # Files of a split lie in a folder of the split's name, with or without it in file_name.
    names = files.select("path", "name", "bytes").with_columns(pl.col("name").alias("file"))
    joined = names.join(entries, on="file", how="left", maintain_order="left")
    entries = entries.with_columns(pl.col("file").str.replace(r"^.*/", ""))
    unmatched = joined.filter(pl.col("image_id").is_null()).select("path", "name", "bytes", "file")
    if unmatched.height == joined.height and joined.height:
        joined = unmatched.join(entries, on="file", how="left", maintain_order="left")
    known = set(joined["image_id"].drop_nulls().to_list())
    dropped[MISSING] += sum(entry not in known for entry in entries["image_id"].to_list())
    terms = pl.col("terms").replace_strict(found.licences or {0: ""}, default=None, return_dtype=pl.String)
    stem = pl.col("name").str.replace(r"\.[^.]*$", "")
    joined = joined.with_columns(terms.alias("licence"), stem.alias("key"))
    return joined.unique("path", keep="first", maintain_order=True), dropped


def read_coco(path: Path, images: Path, masks: bool = False) -> Annotations:
    """Read a COCO JSON and the pictures it names.

    Args:
        path: the JSON.
        images: the folder that ``file_name`` starts from.
        masks: take ``segmentation`` where given; it then gives the box.

    Raises:
        UserError: the JSON is none, or holds no images.
    """
    found = _Collector(masks)
    found.read(path)
    if not found.images:
        raise UserError(f"'{path}' holds no 'images'; is it a COCO annotation file?")
    pictures, dropped = _join_pictures(found, images)
    rows = pictures.select("image_id", pl.int_range(pl.len(), dtype=pl.UInt32).alias("picture"))
    joined = _box_frame(found).join(rows.drop_nulls(), on="image_id", how="left", maintain_order="left")
    boxes = joined.filter(pl.col("picture").is_not_null()).select(list(BOX_COLUMNS))
    no_box = (pl.col("mask").fill_null("") == "") & ~pl.all_horizontal(
        pl.col("x1", "y1", "x2", "y2").is_finite()
    )
    bad = boxes.filter(no_box).height
    empty = pl.when(pl.col("mask") == "").then(None).otherwise(pl.col("mask")).alias("mask")
    hollow = [
        pl.when(pl.col("mask").fill_null("") != "").then(None).otherwise(pl.col(name)).alias(name)
        for name in ("x1", "y1", "x2", "y2")
    ]
    boxes = (
        boxes.filter(~no_box).with_columns(hollow).with_columns(empty).sort("picture", maintain_order=True)
    )
    lost = Counter({MISSING: joined.height - bad - boxes.height, BAD_NUMBER: bad})
    return Annotations(
        complete(pictures), boxes, False, +(found.dropped_pictures + dropped), +(found.dropped_boxes + lost)
    )
