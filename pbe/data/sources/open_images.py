"""Open Images, versions 4 to 7: the CSVs of boxes, class names and licences, and the folders of images.

A folder may hold the parts under these names or under ``annotations/`` and ``images/``::

    oidv6-train-annotations-bbox.csv      or train-annotations-bbox.csv; validation-..., test-...
    oidv7-class-descriptions-boxable.csv  or class-descriptions-boxable.csv: names for /m/01g317 (optional)
    *train-images*.csv                    licence and author (optional)
    train_0 ... train_9 train_a ... train_f, or train/, or the images themselves; validation/, test/

Coordinates are shares of the image's width and height.
"""

from __future__ import annotations

import csv
import io
import string
from pathlib import Path

import polars as pl

from pbe.data.sources.annotations import MISSING, Annotations, complete, find_images
from pbe.data.sources.csv_table import Table, flag_bits, join_boxes, scan_table
from pbe.data.sources.image_files import need_folder
from pbe.data.sources.parsing import number_column, read_text, shown
from pbe.errors import UserError

SPLITS = ("train", "validation", "test")
TRAIN_FOLDERS = tuple(f"train_{letter}" for letter in string.hexdigits[:16])
COORDINATES = {"x1": "XMin", "y1": "YMin", "x2": "XMax", "y2": "YMax"}
FLAG_COLUMNS = {
    "is_occluded": "IsOccluded",
    "is_truncated": "IsTruncated",
    "is_group_of": "IsGroupOf",
    "is_depiction": "IsDepiction",
    "is_inside": "IsInside",
}


def _find(folder: Path, *patterns: str, alike: bool = False) -> Path | None:
    """Return the file that matches the first pattern that fits any, in the folder or in ``annotations/``.

    Several that match it are an error, unless they are ``alike``: then any will do.
    """
    for pattern in patterns:
        for place in (folder, folder / "annotations"):
            found = sorted(path for path in place.glob(pattern) if not path.name.startswith("."))
            if len(found) > 1 and not alike:
                names = ", ".join(path.name for path in found)
                raise UserError(f"'{place}' holds several files {pattern}: {names}; leave one there")
            if found:
                return found[0]
    return None


def _image_folders(folder: Path, split: str) -> list[Path]:
    """Return the folders that hold a split's images."""
    names = (*TRAIN_FOLDERS, split) if split == "train" else (split,)
    for place in (folder / "images", folder):
        parts = [place / name for name in names if (place / name).is_dir()]
        if parts:
            return parts
    flat = folder / "images" if (folder / "images").is_dir() else folder
    if any(flat.glob("*.jpg")):
        return [flat]
    wanted = "train_0 ... train_f or train" if split == "train" else split
    raise UserError(f"'{folder}' holds no images of the {split} split: no folder {wanted}, in images/ or not")


def _scan_boxes(path: Path, names: dict[str, str]) -> tuple[Table, pl.LazyFrame]:
    """Return an annotation CSV, and its boxes, lazily, as :func:`join_boxes` takes them.

    Columns may stand in any order, and others among them. A flag that is -1 (unknown) or has no column
    counts as not set. A coordinate that is no number is null. ``names`` are those of classes by code; codes
    without a name stay.
    """
    table = scan_table(path)
    absent = [name for name in ("ImageID", "LabelName", *COORDINATES.values()) if name not in table.names]
    if absent:
        raise UserError(f"'{path}' lacks the columns {', '.join(absent)}; is it a CSV of Open Images boxes?")
    bits, bad_flag = flag_bits(FLAG_COLUMNS, table.names)
    label = pl.col("LabelName").str.strip_chars().fill_null("")
    boxes = table.rows.select(
        pl.col("ImageID").str.strip_chars().str.replace(r"\.(?i:jpe?g|png)$", "").fill_null("").alias("key"),
        *(number_column(column).alias(name) for name, column in COORDINATES.items()),
        (label.replace(names) if names else label).cast(pl.Categorical).alias("label"),
        bits.alias("flags"),
        bad_flag.alias("bad_flag"),
    )
    return table, boxes


def _class_names(folder: Path) -> dict[str, str]:
    """Return names by /m/ code; empty where there is no such file. Older files have no header."""
    path = _find(folder, "oidv*class-descriptions-boxable*.csv", "class-descriptions-boxable*.csv")
    if path is None:
        return {}
    names: dict[str, str] = {}
    lines = csv.reader(io.StringIO(read_text(path)))
    try:
        for line in lines:
            place = f"'{path}', line {lines.line_num}"
            if not line or line[:1] == ["LabelName"]:
                continue
            if len(line) != 2:
                raise UserError(f"{place}: {len(line)} fields where code,name belong")
            code, name = line[0].strip(), line[1].strip()
            if names.setdefault(code, name) != name:
                raise UserError(f"{place}: a second name for {shown(code)}, {shown(name)}")
    except csv.Error as error:
        raise UserError(f"'{path}', line {lines.line_num}: {error}") from error
    return names


def _with_licences(images: pl.DataFrame, folder: Path, split: str) -> pl.DataFrame:
    path = _find(folder, f"*{split}-images*.csv", "image_ids_and_rotation.csv", alike=True)
    if path is None:
        return images
    table = scan_table(path)
    if not {"ImageID", "License", "Author"} <= set(table.names):
        return images
    facts = table.rows.select(
        pl.col("ImageID").alias("key"), pl.col("License").alias("licence"), pl.col("Author").alias("author")
    )
    known = images.lazy().drop("licence", "author")
    joined = known.join(facts.unique("key", keep="any"), on="key", how="left", maintain_order="left")
    return complete(table.collect(joined))


def read_open_images(folder: Path, images: Path | None = None, split: str = "train") -> Annotations:
    """Read one split.

    Args:
        folder: holds the annotations and, unless ``images`` is given, the images.
        images: holds the images, in the folders above.
        split: ``train``, ``validation`` or ``test``.
    """
    if split not in SPLITS:
        raise UserError(f"split '{split}' is none of Open Images'; it must be one of {', '.join(SPLITS)}")
    need_folder(folder, "the Open Images folder")
    path = _find(folder, f"oidv*{split}-annotations-bbox.csv", f"{split}-annotations-bbox.csv")
    if path is None:
        raise UserError(f"'{folder}' holds no {split}-annotations-bbox.csv, in annotations/ or not")
    root = images or folder
    files, dropped = find_images(_image_folders(root, split), stems=True, root=root)
    table, boxes = _scan_boxes(path, _class_names(folder))
    found = join_boxes(_with_licences(files, folder, split), boxes, table, True, dropped)
    if not found.boxes.height and found.dropped_boxes[MISSING]:
        wanted = table.collect(boxes.select(pl.col("key").first())).item()
        raise UserError(
            f"no image of the boxes is there: '{path}' names {shown(wanted)}, which is not in '{root}';"
            f" images there are called like {shown(files['key'].first())}"
        )
    return found
