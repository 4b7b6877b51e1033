"""CSV tables with a header, read lazily: Open Images, and a folder of images with a CSV of boxes.

The latter is the format to write when one's own data have none. One line a box, columns by name and in any
order: ``file`` (within the folder), ``x1``, ``y1``, ``x2``, ``y2`` (or ``x``, ``y``, ``width``, ``height``),
and, if wanted, ``label`` and the flags of :data:`~pbe.data.sources.annotations.FLAGS`. Numbers are
pixels, or shares where ``relative`` is set. Commas, semicolons and tabs may part the columns; where they are
no commas, one may stand for the decimal point.

Open Images, versions 4 to 7, are the CSVs of boxes, class names and licences, and folders of images. Numbers
are shares of the image's width and height. A folder may hold the parts under these names or under
``annotations/`` and ``images/``::

    oidv6-train-annotations-bbox.csv      or train-annotations-bbox.csv; validation-..., test-...
    oidv7-class-descriptions-boxable.csv  or class-descriptions-boxable.csv: names for /m/01g317 (optional)
    *train-images*.csv                    licence and author (optional)
    train_0 ... train_9 train_a ... train_f, or train/, or the images themselves; validation/, test/
"""

from __future__ import annotations

import csv
import io
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pbe.data.sources.annotations import (
    BOX_COLUMNS,
    CORNERS,
    FLAG_BITS,
    IMAGE_COLUMNS,
    Annotations,
    Reason,
    find_images,
)
from pbe.data.sources.image_files import need_folder
from pbe.data.sources.names import AMBIGUOUS, NameMatcher
from pbe.data.sources.parsing import file_encoding, flag_column, number_column, read_text, shown, undecodable
from pbe.errors import UserError

SIZES = ("x", "y", "width", "height")
SEPARATORS = ",;\t|"
SORT_PIECES = 16
SPLITS = ("train", "validation", "test")
TRAIN_FOLDERS = tuple(f"train_{letter}" for letter in string.hexdigits[:16])
COORDINATES = {"x1": "XMin", "y1": "YMin", "x2": "XMax", "y2": "YMax"}
FLAG_COLUMNS = {flag: flag.title().replace("_", "") for flag in FLAG_BITS}  # IsOccluded, IsGroupOf ...
_REPEATED = re.compile(r"_duplicated_\d+$")  # how polars tells columns of one name apart


@dataclass(frozen=True)
class _Table:
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


def _scan_table(path: Path, wanted: str = "") -> _Table:
    """Open a CSV with a header. UTF-8 is read piece by piece, UTF-16 and UTF-32 at once.

    Names of columns lose the spaces around them. ``wanted`` is a column by whose name the separator is
    recognised, and makes all names lower case; without it the separator is a comma.
    """
    encoding, separator = file_encoding(path), ","
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        header = file.readline(2**16)
    if wanted:
        columns = {sign: [name.strip(' \r\n"').lower() for name in header.split(sign)] for sign in SEPARATORS}
        separator = next((sign for sign in SEPARATORS if wanted in columns[sign]), ",")
    # A lone CR parts the lines of a file that old tools wrote.
    at_once = encoding.startswith(("utf-16", "utf-32")) or header.endswith("\r")
    source = io.BytesIO(read_text(path).encode()) if at_once else path
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
    return _Table(path, rows.filter(~pl.all_horizontal(pl.all().is_null())), names, separator)


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


def _flags(columns: dict[str, str], names: list[str]) -> tuple[pl.Expr, pl.Expr]:
    """Return the flags of a row as bits, ``flags``, and whether one is neither yes nor no, ``bad_flag``.

    ``columns`` are their names by flag; the flags of those that are not among ``names`` are not set.
    """
    found = {flag: flag_column(column) for flag, column in columns.items() if column in names}
    bits = [pl.when(yes).then(FLAG_BITS[flag]).otherwise(0) for flag, (yes, _) in found.items()]
    bad = pl.any_horizontal([pl.lit(False), *(bad for _, bad in found.values())])
    return pl.sum_horizontal([pl.lit(0), *bits]).cast(BOX_COLUMNS["flags"]).alias("flags"), bad.alias(
        "bad_flag"
    )


def _join_boxes(
    images: pl.DataFrame, boxes: pl.LazyFrame, table: _Table, relative: bool, dropped: Counter[str]
) -> Annotations:
    """Give boxes of a table, which name their image by ``key``, the row of that image.

    ``boxes`` have ``key`` instead of ``image``, ``bad_flag``, and no ``mask``. They are read several times,
    so that the text of the file and the keys are never held in memory. ``dropped``: images dropped before.
    """
    rows = images.lazy().select("key", pl.int_range(pl.len(), dtype=pl.UInt32).alias("image"))
    missing = boxes.select("key").join(rows, on="key", how="anti")
    lost = table.collect(missing.select(pl.len().alias("boxes"), pl.col("key").n_unique().alias("images")))
    wanted = [name for name in BOX_COLUMNS if name != "mask"]
    there = boxes.join(rows, on="key", how="inner")
    found = table.collect(there.filter(~pl.col("bad_flag")).select(wanted))
    # Sorted by all that they hold, piece by piece: sorting takes far more memory than its rows.
    piece = pl.col("image") // max(-(-images.height // SORT_PIECES), 1)
    keys = ("image", *CORNERS, "label")
    parts = [found.filter(piece == number).sort(*keys, nulls_last=True) for number in range(SORT_PIECES)]
    found = pl.concat(parts, rechunk=False).with_columns(pl.lit(None, BOX_COLUMNS["mask"]).alias("mask"))
    bad = table.count(there.filter(pl.col("bad_flag")).select("key"))
    dropped_images = dropped + Counter({Reason.MISSING: int(lost["images"][0])})
    dropped_boxes = Counter[str]({Reason.MISSING: int(lost["boxes"][0]), Reason.BAD_FLAG: bad})
    return Annotations(images, found, relative, +dropped_images, +dropped_boxes)


def _corners(table: _Table) -> list[pl.Expr]:
    decimal_comma = table.separator != ","
    if set(CORNERS) <= set(table.names):
        return [number_column(name, decimal_comma).alias(name) for name in CORNERS]
    if set(SIZES) <= set(table.names):
        x, y, width, height = (number_column(name, decimal_comma) for name in SIZES)
        return [x.alias("x1"), y.alias("y1"), (x + width).alias("x2"), (y + height).alias("y2")]
    raise table.lacks(f"the columns {', '.join(CORNERS)}, or {', '.join(SIZES)}")


def read_csv(path: Path, images: Path, relative: bool = False) -> Annotations:
    """Read a CSV of boxes, whose ``file`` starts from the folder ``images``, and the images there."""
    table = _scan_table(path, wanted="file")
    if "file" not in table.names:
        raise table.lacks(f"the column 'file', the image's name within '{images}'")
    label = pl.col("label").str.strip_chars().fill_null("") if "label" in table.names else pl.lit("")
    boxes = table.rows.select(
        pl.col("file").fill_null("").alias("key"),
        *_corners(table),
        label.cast(pl.Categorical).alias("label"),
        *_flags({name: name for name in FLAG_BITS}, table.names),
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
    found = _join_boxes(files, clear, table, relative, dropped)
    found.images = found.images.with_columns(pl.col("key").str.replace(r"\.[^./]*$", ""))
    found.dropped_boxes += Counter({Reason.AMBIGUOUS_NAME: table.count(boxes.filter(fits_several))})
    found.dropped_images += Counter({Reason.AMBIGUOUS_NAME: len(unclear)})
    found.notes += [matcher.explain(missing, path)] if missing else []
    return found


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


def _class_names(folder: Path) -> dict[str, str]:
    """Return names by /m/ code; empty where there is no such file. Older files have no header."""
    path = _find(folder, "oidv*class-descriptions-boxable*.csv", "class-descriptions-boxable*.csv")
    names: dict[str, str] = {}
    lines = csv.reader(io.StringIO(read_text(path) if path else ""))
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
    table = _scan_table(path) if path else None
    if table is None or not {"ImageID", "License", "Author"} <= set(table.names):
        return images
    facts = table.rows.select(key="ImageID", licence="License", author="Author").unique("key", keep="any")
    known = images.lazy().drop("licence", "author")
    return table.collect(known.join(facts, on="key", how="left", maintain_order="left")).select(
        list(IMAGE_COLUMNS)
    )


def read_open_images(folder: Path, images: Path | None = None, split: str = "train") -> Annotations:
    """Read one split of a folder that holds the annotations and, unless ``images`` is given, the images.

    Columns of the boxes may stand in any order, and others among them. A flag that is -1 (unknown) or has no
    column counts as not set; codes of classes without a name stay.
    """
    if split not in SPLITS:
        raise UserError(f"Open Images has no split '{split}'; it must be one of {', '.join(SPLITS)}")
    need_folder(folder, "the Open Images folder")
    path = _find(folder, f"oidv*{split}-annotations-bbox.csv", f"{split}-annotations-bbox.csv")
    if path is None:
        raise UserError(f"'{folder}' holds no {split}-annotations-bbox.csv, in annotations/ or not")
    root = images or folder
    files, dropped = find_images(_image_folders(root, split), stems=True, root=root)
    names, table = _class_names(folder), _scan_table(path)
    absent = [name for name in ("ImageID", "LabelName", *COORDINATES.values()) if name not in table.names]
    if absent:
        raise UserError(f"'{path}' lacks the columns {', '.join(absent)}; is it a CSV of Open Images boxes?")
    label = pl.col("LabelName").str.strip_chars().fill_null("")
    boxes = table.rows.select(
        pl.col("ImageID").str.strip_chars().str.replace(r"\.(?i:jpe?g|png)$", "").fill_null("").alias("key"),
        *(number_column(column).alias(name) for name, column in COORDINATES.items()),
        (label.replace(names) if names else label).cast(pl.Categorical).alias("label"),
        *_flags(FLAG_COLUMNS, table.names),
    )
    found = _join_boxes(_with_licences(files, folder, split), boxes, table, True, dropped)
    if not found.boxes.height and found.dropped_boxes[Reason.MISSING]:
        wanted = table.collect(boxes.select(pl.col("key").first())).item()
        raise UserError(
            f"no image of the boxes is there: '{path}' names {shown(wanted)}, which is not in '{root}';"
            f" images there are called like {shown(files['key'].first())}"
        )
    return found
