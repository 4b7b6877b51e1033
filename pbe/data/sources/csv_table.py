"""A folder of pictures and a CSV of boxes: the format to write when one's own data have none.

One line a box, columns by name and in any order: ``file`` (within the folder), ``x1``, ``y1``, ``x2``, ``y2``
(or ``x``, ``y``, ``width``, ``height``), and, if wanted, ``label`` and the flags of
:data:`~pbe.data.sources.records.FLAGS`. Numbers are pixels, or shares where ``relative`` is set.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pbe.data.sources.files import find_pictures, need_file, scan_table
from pbe.data.sources.records import BOX_COLUMNS, FLAG_BITS, Annotations, join_boxes
from pbe.errors import UserError

CORNERS = ("x1", "y1", "x2", "y2")
SIZES = ("x", "y", "width", "height")
TRUE = ("1", "true", "yes")


def _number(name: str) -> pl.Expr:
    return pl.col(name).str.strip_chars().cast(pl.Float64, strict=False)


def _corners(present: list[str], path: Path) -> list[pl.Expr]:
    if set(CORNERS) <= set(present):
        return [_number(name).alias(name) for name in CORNERS]
    if set(SIZES) <= set(present):
        x, y, width, height = (_number(name) for name in SIZES)
        return [x.alias("x1"), y.alias("y1"), (x + width).alias("x2"), (y + height).alias("y2")]
    raise UserError(f"'{path}' needs the columns {', '.join(CORNERS)}, or {', '.join(SIZES)}")


def read_csv(path: Path, images: Path, relative: bool = False) -> Annotations:
    """Read a CSV of boxes and the pictures of a folder.

    Args:
        path: the CSV, with a header.
        images: the folder that ``file`` starts from.
        relative: numbers are shares of the picture's width and height.

    Raises:
        UserError: a column is missing, or the file is no CSV.
    """
    need_file(path, "the CSV of boxes")
    table, present = scan_table(path)
    if "file" not in present:
        raise UserError(f"'{path}' lacks the column 'file', the picture's name within '{images}'")
    flags = [
        pl.when(pl.col(name).str.strip_chars().str.to_lowercase().is_in(TRUE)).then(bit).otherwise(0)
        for name, bit in FLAG_BITS.items()
        if name in present
    ]
    label = pl.col("label") if "label" in present else pl.lit("")
    boxes = table.select(
        pl.col("file").str.replace_all(r"\\", "/").str.strip_prefix("./").alias("key"),
        *_corners(present, path),
        label.fill_null("").cast(pl.Categorical).alias("label"),
        pl.sum_horizontal([pl.lit(0), *flags]).cast(BOX_COLUMNS["flags"]).alias("flags"),
    )
    pictures, dropped = find_pictures([images])
    found = join_boxes(pictures, boxes, relative, dropped)
    found.pictures = found.pictures.with_columns(pl.col("key").str.replace(r"\.[^./]*$", ""))
    return found
