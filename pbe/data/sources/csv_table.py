"""A folder of pictures and a CSV of boxes: the format to write when one's own data have none.

One line a box, columns by name and in any order: ``file`` (within the folder), ``x1``, ``y1``, ``x2``, ``y2``
(or ``x``, ``y``, ``width``, ``height``), and, if wanted, ``label`` and the flags of
:data:`~pbe.data.sources.records.FLAGS`. Numbers are pixels, or shares where ``relative`` is set. Commas,
semicolons and tabs may part the columns; where they are no commas, one may stand for the decimal point.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import polars as pl

from pbe.data.sources.files import find_pictures, need_file
from pbe.data.sources.names import AMBIGUOUS, AMBIGUOUS_NAME, NameMatcher
from pbe.data.sources.records import FLAGS, Annotations
from pbe.data.sources.scalars import number_column
from pbe.data.sources.tables import Table, flag_bits, join_boxes, scan_table
from pbe.errors import UserError

CORNERS = ("x1", "y1", "x2", "y2")
SIZES = ("x", "y", "width", "height")


def _corners(table: Table) -> list[pl.Expr]:
    decimal_comma = table.separator != ","
    if set(CORNERS) <= set(table.names):
        return [number_column(name, decimal_comma).alias(name) for name in CORNERS]
    if set(SIZES) <= set(table.names):
        x, y, width, height = (number_column(name, decimal_comma) for name in SIZES)
        return [x.alias("x1"), y.alias("y1"), (x + width).alias("x2"), (y + height).alias("y2")]
    raise table.lacks(f"the columns {', '.join(CORNERS)}, or {', '.join(SIZES)}")


def _boxes(table: Table, images: Path) -> pl.LazyFrame:
    """Return the boxes, lazily, as :func:`join_boxes` takes them."""
    if "file" not in table.names:
        raise table.lacks(f"the column 'file', the picture's name within '{images}'")
    bits, bad_flag = flag_bits({name: name for name in FLAGS}, table.names)
    label = pl.col("label").str.strip_chars().fill_null("") if "label" in table.names else pl.lit("")
    return table.rows.select(
        pl.col("file").fill_null("").alias("key"),
        *_corners(table),
        label.cast(pl.Categorical).alias("label"),
        bits.alias("flags"),
        bad_flag.alias("bad_flag"),
    )


def read_csv(path: Path, images: Path, relative: bool = False) -> Annotations:
    """Read a CSV of boxes and the pictures of a folder.

    Args:
        path: the CSV, with a header.
        images: the folder that ``file`` starts from.
        relative: numbers are shares of the picture's width and height.

    Raises:
        UserError: a column is missing, the file is no CSV, or it names none of the folder's pictures.
    """
    need_file(path, "the CSV of boxes")
    table = scan_table(path, wanted="file")
    boxes = _boxes(table, images)
    pictures, dropped = find_pictures([images])
    names = pictures["name"].to_list()
    matcher = NameMatcher(names, images)
    rows = matcher.match(table.collect(boxes.select(pl.col("key").unique().sort()))["key"].to_list())
    missing = [name for name, row in rows.items() if row is None]
    if missing and len(missing) == len(rows):
        raise UserError(f"no picture of the boxes is there: {matcher.explain(missing, path)}")
    unclear = [name for name, row in rows.items() if row == AMBIGUOUS]
    known = ((name, names[row]) for name, row in rows.items() if row is not None and row != AMBIGUOUS)
    moved = {name: other for name, other in known if name != other}
    fits_several = pl.col("key").is_in(unclear)
    clear = boxes.filter(~fits_several).with_columns(pl.col("key").replace(moved))
    found = join_boxes(pictures, clear, table, relative, dropped)
    found.pictures = found.pictures.with_columns(pl.col("key").str.replace(r"\.[^./]*$", ""))
    found.dropped_boxes += Counter({AMBIGUOUS_NAME: table.count(boxes.filter(fits_several))})
    found.dropped_pictures += Counter({AMBIGUOUS_NAME: len(unclear)})
    found.notes += [matcher.explain(missing, path)] if missing else []
    return found
