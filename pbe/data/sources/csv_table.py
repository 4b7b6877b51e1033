"""CSV tables with a header, read lazily; and a folder of images with a CSV of boxes.

The latter is the format to write when one's own data have none. One line a box, columns by name and in any
order: ``file`` (within the folder), ``x1``, ``y1``, ``x2``, ``y2`` (or ``x``, ``y``, ``width``, ``height``),
and, if wanted, ``label`` and the flags of :data:`~pbe.data.sources.annotations.FLAGS`. Numbers are pixels, or
shares where ``relative`` is set. Commas, semicolons and tabs may part the columns; where they are no commas,
one may stand for the decimal point.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pbe.data.sources.annotations import (
    BAD_FLAG,
    BOX_COLUMNS,
    CORNERS,
    FLAG_BITS,
    FLAGS,
    MISSING,
    Annotations,
    find_images,
)
from pbe.data.sources.image_files import need_file
from pbe.data.sources.names import AMBIGUOUS, AMBIGUOUS_NAME, NameMatcher
from pbe.data.sources.parsing import (
    file_encoding,
    flag_column,
    number_column,
    read_text,
    shown,
    undecodable,
)
from pbe.errors import UserError

SIZES = ("x", "y", "width", "height")
SEPARATORS = ",;\t|"
SORT_PIECES = 16
_REPEATED = re.compile(r"_duplicated_\d+$")  # how polars tells columns of one name apart


@dataclass(frozen=True)
class Table:
    """A CSV with a header: all columns as text, blank lines left out."""

    path: Path
    rows: pl.LazyFrame
    names: list[str]
    separator: str

    def collect(self, query: pl.LazyFrame) -> pl.DataFrame:
        """Return the result of a query on the rows; where a line is damaged, the error names it."""
        try:
            return query.collect(engine="streaming")
        except (OSError, pl.exceptions.PolarsError) as error:
            reason = _reason(self.path, error, self.separator)
            raise UserError(f"the CSV '{self.path}' cannot be read to its end: {reason}") from error

    def lacks(self, wanted: str) -> UserError:
        """Return the error that columns are missing."""
        present = ", ".join(_REPEATED.sub("", name) for name in self.names)
        return UserError(f"'{self.path}' lacks {wanted}; it has the columns {shown(present)}")

    def count(self, query: pl.LazyFrame) -> int:
        """Return the number of rows of a query on the rows."""
        return int(self.collect(query.select(pl.len())).item())


def scan_table(path: Path, wanted: str = "") -> Table:
    """Open a CSV with a header. UTF-8 is read piece by piece, UTF-16 at once.

    Names of columns lose the spaces around them and, with ``wanted``, become lower case.

    Args:
        path: the file.
        wanted: a column by whose name the separator is recognised; with none it is a comma.
    """
    header, separator = _header(path), ","
    if wanted:
        columns = {sign: [name.strip(' \r\n"').lower() for name in header.split(sign)] for sign in SEPARATORS}
        separator = next((sign for sign in SEPARATORS if wanted in columns[sign]), ",")
    wide = file_encoding(path).startswith("utf-16") or file_encoding(path) == "utf-32"
    source = io.BytesIO(read_text(path).encode()) if wide or header.endswith("\r") else path
    try:
        rows = pl.scan_csv(source, infer_schema=False, separator=separator, glob=False)
        present = rows.collect_schema().names()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"'{path}' is not a CSV with a header: {_reason(path, error, separator)}") from error
    names = [name.strip().lower() if wanted else name.strip() for name in present]
    plain = [_REPEATED.sub("", name) for name in names]
    twice = next((name for name in plain if name and plain.count(name) > 1), None)
    if twice is not None and (not wanted or wanted in names):
        raise UserError(f"'{path}' has two columns {shown(twice)}")
    rows = rows.rename(dict(zip(present, names, strict=True)))
    return Table(path, rows.filter(~pl.all_horizontal(pl.all().is_null())), names, separator)


def _header(path: Path) -> str:
    """Return the first line, with its end: a lone CR parts the lines of a file that old tools wrote."""
    with path.open(encoding=file_encoding(path), errors="replace", newline="") as file:
        return file.readline(2**16)


def _reason(path: Path, error: Exception, separator: str) -> str:
    """Return what is wrong, with the line where that can be found out."""
    try:
        with path.open(encoding=file_encoding(path), newline="") as file:
            lines = csv.reader(file, delimiter=separator)
            header = next(lines, [])
            for line in lines:
                if len(line) > len(header):
                    return f"line {lines.line_num} has {len(line)} fields where the header has {len(header)}"
    except UnicodeError as bad:
        return undecodable(path, bad)
    except (OSError, csv.Error):
        pass  # then the words of the reader that failed have to do
    return next(iter(str(error).splitlines()), type(error).__name__)


def flag_bits(columns: dict[str, str], names: list[str]) -> tuple[pl.Expr, pl.Expr]:
    """Return the flags of a row as bits, and whether one of them is neither yes nor no.

    ``columns`` are their names by flag; the flags of those that are not among ``names`` are not set.
    """
    found = {flag: flag_column(column) for flag, column in columns.items() if column in names}
    bits = [pl.when(yes).then(FLAG_BITS[flag]).otherwise(0) for flag, (yes, _) in found.items()]
    bad = pl.any_horizontal([pl.lit(False), *(bad for _, bad in found.values())])
    return pl.sum_horizontal([pl.lit(0), *bits]).cast(BOX_COLUMNS["flags"]), bad


def join_boxes(
    images: pl.DataFrame, boxes: pl.LazyFrame, table: Table, relative: bool, dropped: Counter[str]
) -> Annotations:
    """Give boxes that name their image by ``key`` the row of that image.

    Args:
        images: columns of :data:`IMAGE_COLUMNS`, keys unique.
        boxes: of ``table``: columns of :data:`BOX_COLUMNS` with ``key`` (text) instead of ``image`` and
            ``bad_flag`` (whether a flag is none), and no ``mask``. They are read several times, so that the
            text of the file and the keys are never held in memory.
        table: what they are read from.
        relative: see :class:`Annotations`.
        dropped: images that were dropped before, by reason.
    """
    rows = images.lazy().select("key", pl.int_range(pl.len(), dtype=pl.UInt32).alias("image"))
    missing = boxes.select("key").join(rows, on="key", how="anti")
    lost = table.collect(missing.select(pl.len().alias("boxes"), pl.col("key").n_unique().alias("images")))
    wanted = [name for name in BOX_COLUMNS if name != "mask"]
    there = boxes.join(rows, on="key", how="inner")
    found = _sorted(table.collect(there.filter(~pl.col("bad_flag")).select(wanted)), images.height)
    found = found.with_columns(pl.lit(None, BOX_COLUMNS["mask"]).alias("mask"))
    bad = table.count(there.filter(pl.col("bad_flag")).select("key"))
    dropped_images = dropped + Counter({MISSING: int(lost["images"][0])})
    dropped_boxes = Counter({MISSING: int(lost["boxes"][0]), BAD_FLAG: bad})
    return Annotations(images, found, relative, +dropped_images, +dropped_boxes)


def _sorted(boxes: pl.DataFrame, images: int) -> pl.DataFrame:
    """Sort boxes by all that they hold, piece by piece: sorting takes far more memory than its rows."""
    step = max(-(-images // SORT_PIECES), 1)
    piece = pl.col("image") // step
    keys = ("image", *CORNERS, "label")
    parts = [boxes.filter(piece == number).sort(*keys, nulls_last=True) for number in range(SORT_PIECES)]
    return pl.concat(parts, rechunk=False)


def _corners(table: Table) -> list[pl.Expr]:
    decimal_comma = table.separator != ","
    if set(CORNERS) <= set(table.names):
        return [number_column(name, decimal_comma).alias(name) for name in CORNERS]
    if set(SIZES) <= set(table.names):
        x, y, width, height = (number_column(name, decimal_comma) for name in SIZES)
        return [x.alias("x1"), y.alias("y1"), (x + width).alias("x2"), (y + height).alias("y2")]
    raise table.lacks(f"the columns {', '.join(CORNERS)}, or {', '.join(SIZES)}")


def read_csv(path: Path, images: Path, relative: bool = False) -> Annotations:
    """Read a CSV of boxes and the images of a folder.

    Args:
        path: the CSV, with a header.
        images: the folder that ``file`` starts from.
        relative: numbers are shares of the image's width and height.
    """
    need_file(path, "the CSV of boxes")
    table = scan_table(path, wanted="file")
    if "file" not in table.names:
        raise table.lacks(f"the column 'file', the image's name within '{images}'")
    bits, bad_flag = flag_bits({name: name for name in FLAGS}, table.names)
    label = pl.col("label").str.strip_chars().fill_null("") if "label" in table.names else pl.lit("")
    boxes = table.rows.select(
        pl.col("file").fill_null("").alias("key"),
        *_corners(table),
        label.cast(pl.Categorical).alias("label"),
        bits.alias("flags"),
        bad_flag.alias("bad_flag"),
    )
    files, dropped = find_images([images])
    names = files["name"].to_list()
    matcher = NameMatcher(names, images)
    rows = matcher.match(table.collect(boxes.select(pl.col("key").unique().sort()))["key"].to_list())
    missing = [name for name, row in rows.items() if row is None]
    if missing and len(missing) == len(rows):
        raise UserError(f"no image of the boxes is there: {matcher.explain(missing, path)}")
    unclear = [name for name, row in rows.items() if row == AMBIGUOUS]
    known = ((name, names[row]) for name, row in rows.items() if row is not None and row != AMBIGUOUS)
    moved = {name: other for name, other in known if name != other}
    fits_several = pl.col("key").is_in(unclear)
    clear = boxes.filter(~fits_several).with_columns(pl.col("key").replace(moved))
    found = join_boxes(files, clear, table, relative, dropped)
    found.images = found.images.with_columns(pl.col("key").str.replace(r"\.[^./]*$", ""))
    found.dropped_boxes += Counter({AMBIGUOUS_NAME: table.count(boxes.filter(fits_several))})
    found.dropped_images += Counter({AMBIGUOUS_NAME: len(unclear)})
    found.notes += [matcher.explain(missing, path)] if missing else []
    return found
