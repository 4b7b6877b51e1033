"""CSV tables with a header, read lazily; the separator is found, and errors name the line."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pbe.data.sources.records import BAD_FLAG, BOX_COLUMNS, FLAG_BITS, MISSING, Annotations
from pbe.data.sources.scalars import flag_column
from pbe.data.sources.texts import file_encoding, read_text, shown, undecodable
from pbe.errors import UserError

SEPARATORS = ",;\t|"
SORT_PIECES = 16
_REPEATED = re.compile(r"_duplicated_\d+$")  # how polars tells columns of one name apart


@dataclass(frozen=True)
class Table:
    """A CSV with a header.

    Attributes:
        path: of the file.
        rows: all columns as text; blank lines are left out.
        names: of the columns.
        separator: between the columns.
    """

    path: Path
    rows: pl.LazyFrame
    names: list[str]
    separator: str

    def collect(self, query: pl.LazyFrame) -> pl.DataFrame:
        """Return the result of a query on the rows.

        Raises:
            UserError: a line of the file is damaged.
        """
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
    """Open a CSV with a header.

    Names of columns lose the spaces around them and, with ``wanted``, become lower case.

    Args:
        path: the file; UTF-8 is read piece by piece, UTF-16 at once.
        wanted: a column by whose name the separator is recognised; with none it is a comma.

    Raises:
        UserError: it has no header, is no text, or two columns have one name.
    """
    separator = _separator(path, wanted) if wanted else ","
    wide = file_encoding(path).startswith("utf-16") or file_encoding(path) == "utf-32"
    source = io.BytesIO(read_text(path).encode()) if wide or _header(path).endswith("\r") else path
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


def _separator(path: Path, wanted: str) -> str:
    header = _header(path)
    for separator in SEPARATORS:
        if wanted in (name.strip(' \r\n"').lower() for name in header.split(separator)):
            return separator
    return ","


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

    Args:
        columns: name of the column by flag.
        names: of the columns that are there; the flags of others are not set.
    """
    found = {flag: flag_column(column) for flag, column in columns.items() if column in names}
    bits = [pl.when(yes).then(FLAG_BITS[flag]).otherwise(0) for flag, (yes, _) in found.items()]
    bad = pl.any_horizontal([pl.lit(False), *(bad for _, bad in found.values())])
    return pl.sum_horizontal([pl.lit(0), *bits]).cast(BOX_COLUMNS["flags"]), bad


def join_boxes(
    pictures: pl.DataFrame, boxes: pl.LazyFrame, table: Table, relative: bool, dropped: Counter[str]
) -> Annotations:
    """Give boxes that name their picture by ``key`` the row of that picture.

    Args:
        pictures: columns of :data:`PICTURE_COLUMNS`, keys unique.
        boxes: of ``table``: columns of :data:`BOX_COLUMNS` with ``key`` (text) instead of ``picture`` and
            ``bad_flag`` (whether a flag is none), and no ``mask``. They are read several times, so that the
            text of the file and the keys are never held in memory.
        table: what they are read from.
        relative: see :class:`Annotations`.
        dropped: pictures that were dropped before, by reason.

    Raises:
        UserError: a line of the file is damaged.
    """
    rows = pictures.lazy().select("key", pl.int_range(pl.len(), dtype=pl.UInt32).alias("picture"))
    missing = boxes.select("key").join(rows, on="key", how="anti")
    lost = table.collect(missing.select(pl.len().alias("boxes"), pl.col("key").n_unique().alias("pictures")))
    wanted = [name for name in BOX_COLUMNS if name != "mask"]
    there = boxes.join(rows, on="key", how="inner")
    found = table.collect(there.filter(~pl.col("bad_flag")).select(wanted))
    dropped_pictures = dropped + Counter({MISSING: int(lost["pictures"][0])})
    found = _sorted(found, pictures.height).with_columns(pl.lit(None, BOX_COLUMNS["mask"]).alias("mask"))
    bad = table.count(there.filter(pl.col("bad_flag")).select("key"))
    dropped_boxes = Counter({MISSING: int(lost["boxes"][0]), BAD_FLAG: bad})
    return Annotations(pictures, found, relative, +dropped_pictures, +dropped_boxes)


def _sorted(table: pl.DataFrame, pictures: int) -> pl.DataFrame:
    """Sort boxes by all that they hold, piece by piece: sorting takes far more memory than its rows."""
    step = max(-(-pictures // SORT_PIECES), 1)
    piece = pl.col("picture") // step
    keys = ("picture", "x1", "y1", "x2", "y2", "label")
    parts = [table.filter(piece == number).sort(*keys, nulls_last=True) for number in range(SORT_PIECES)]
    return pl.concat(parts, rechunk=False)
