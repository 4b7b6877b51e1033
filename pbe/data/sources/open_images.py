"""Open Images, versions 4 to 7: the CSVs of boxes, class names and licences, and the folders of pictures.

A folder may hold the parts under these names or under ``annotations/`` and ``images/``::

    oidv6-train-annotations-bbox.csv      or train-annotations-bbox.csv; validation-..., test-...
    oidv7-class-descriptions-boxable.csv  or class-descriptions-boxable.csv: names for /m/01g317 (optional)
    *train-images*.csv                    licence and author (optional)
    train_0 ... train_9 train_a ... train_f, or train/, or the pictures themselves; validation/, test/

Coordinates are shares of the picture's width and height.
"""

from __future__ import annotations

import string
from pathlib import Path

import polars as pl

from pbe.data.sources.files import complete, find_pictures, need_folder, scan_table
from pbe.data.sources.records import BOX_COLUMNS, FLAG_BITS, Annotations, join_boxes
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


def _find(folder: Path, *patterns: str) -> Path | None:
    """Return the first file that matches, in the folder itself or in ``annotations/``."""
    for pattern in patterns:
        for place in (folder, folder / "annotations"):
            found = sorted(place.glob(pattern))
            if found:
                return found[0]
    return None


def picture_folders(folder: Path, split: str) -> list[Path]:
    """Return the folders that hold a split's pictures.

    Raises:
        UserError: there are none.
    """
    for place in (folder / "images", folder):
        parts = (
            [place / name for name in TRAIN_FOLDERS if (place / name).is_dir()] if split == "train" else []
        )
        if (place / split).is_dir():
            parts.append(place / split)
        if parts:
            return parts
    flat = folder / "images" if (folder / "images").is_dir() else folder
    if any(flat.glob("*.jpg")):
        return [flat]
    wanted = "train_0 ... train_f or train" if split == "train" else split
    raise UserError(
        f"'{folder}' holds no pictures of the {split} split: no folder {wanted}, in images/ or not"
    )


def scan_boxes(path: Path) -> pl.LazyFrame:
    """Return the boxes of an annotation CSV, lazily: ``key`` and the columns that ``join_boxes`` asks for.

    Columns may stand in any order, and others among them. A flag that is -1 (unknown) or has no column
    counts as not set. A coordinate that is no number is null.

    Raises:
        UserError: a column is missing.
    """
    table, present = scan_table(path)
    absent = [name for name in ("ImageID", "LabelName", *COORDINATES.values()) if name not in present]
    if absent:
        raise UserError(f"'{path}' lacks the columns {', '.join(absent)}; is it a CSV of Open Images boxes?")
    flags = [
        pl.when(pl.col(column).str.strip_chars() == "1").then(FLAG_BITS[flag]).otherwise(0)
        for flag, column in FLAG_COLUMNS.items()
        if column in present
    ]
    coordinates = [
        pl.col(column).str.strip_chars().cast(pl.Float64, strict=False).alias(name)
        for name, column in COORDINATES.items()
    ]
    return table.select(
        pl.col("ImageID").alias("key"),
        *coordinates,
        pl.col("LabelName").cast(pl.Categorical).alias("label"),
        pl.sum_horizontal([pl.lit(0), *flags]).cast(BOX_COLUMNS["flags"]).alias("flags"),
    )


def _class_names(folder: Path) -> dict[str, str]:
    """Return names by /m/ code; empty where there is no such file. Older files have no header."""
    path = _find(folder, "oidv*class-descriptions-boxable*.csv", "class-descriptions-boxable*.csv")
    if path is None:
        return {}
    schema = {"code": pl.String, "name": pl.String}
    table = pl.read_csv(path, has_header=False, schema=schema).filter(pl.col("code") != "LabelName")
    return dict(zip(table["code"].to_list(), table["name"].to_list(), strict=True))


def _with_licences(pictures: pl.DataFrame, folder: Path, split: str) -> pl.DataFrame:
    path = _find(folder, f"*{split}-images*.csv", "image_ids_and_rotation.csv")
    if path is None:
        return complete(pictures)
    rows, present = scan_table(path)
    if not {"ImageID", "License", "Author"} <= set(present):
        return complete(pictures)
    facts = rows.select(
        pl.col("ImageID").alias("key"), pl.col("License").alias("licence"), pl.col("Author").alias("author")
    )
    table = pictures.lazy().drop("licence", "author", strict=False)
    joined = table.join(facts.unique("key", keep="any"), on="key", how="left", maintain_order="left")
    return complete(joined.collect())


def read_open_images(folder: Path, images: Path | None = None, split: str = "train") -> Annotations:
    """Read one split.

    Args:
        folder: holds the annotations and, unless ``images`` is given, the pictures.
        images: holds the pictures, in the folders above.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        UserError: the CSV or the pictures are missing.
    """
    if split not in SPLITS:
        raise UserError(f"split '{split}' is none of Open Images'; it must be one of {', '.join(SPLITS)}")
    need_folder(folder, "the Open Images folder")
    path = _find(folder, f"oidv*{split}-annotations-bbox.csv", f"{split}-annotations-bbox.csv")
    if path is None:
        raise UserError(f"'{folder}' holds no {split}-annotations-bbox.csv, in annotations/ or not")
    root = images or folder
    pictures, dropped = find_pictures(picture_folders(root, split), stems=True, root=root)
    names = _class_names(folder)
    boxes = scan_boxes(path)
    if names:
        label = pl.col("label").cast(pl.String).replace(names).cast(pl.Categorical)
        boxes = boxes.with_columns(label)
    return join_boxes(_with_licences(pictures, folder, split), boxes, True, dropped)
