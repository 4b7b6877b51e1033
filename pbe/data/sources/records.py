"""What every source yields: pictures and their boxes, as columns for millions and as typed records for one.

``Annotations`` holds two tables. Coordinates are either all relative (0 to 1) or all in pixels; a picture's
size may be unknown until its file is opened, which :meth:`Annotations.records` does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from pbe.errors import UserError

FLAGS = ("is_group_of", "is_depiction", "is_occluded", "is_truncated", "is_inside", "is_difficult")
FLAG_BITS = {name: 1 << position for position, name in enumerate(FLAGS)}
MISSING = "picture missing"
BAD_NUMBER = "not a number"
BAD_FLAG = "flag that is neither yes nor no"
BAD_SIZE = "width or height that no picture has"
AMBIGUOUS_ID = "id of several pictures"
OTHER_SIZES = "annotated with several sizes"

PICTURE_COLUMNS: dict[str, Any] = {
    "path": pl.String,
    "name": pl.String,
    "key": pl.String,
    "bytes": pl.Int64,
    "width": pl.Int32,
    "height": pl.Int32,
    "licence": pl.String,
    "author": pl.String,
}
BOX_COLUMNS: dict[str, Any] = {
    "picture": pl.UInt32,
    "x1": pl.Float64,
    "y1": pl.Float64,
    "x2": pl.Float64,
    "y2": pl.Float64,
    "label": pl.Categorical,
    "flags": pl.UInt8,
    "mask": pl.String,
}


@dataclass(frozen=True)
class SourceBox:
    """A box in pixels of its picture, x2 and y2 exclusive, with what its source says about it.

    Attributes:
        x1: left side; all four may lie outside the picture or be NaN (then ``mask`` gives the box).
        y1: upper side.
        x2: right side.
        y2: lower side.
        label: empty where the source names none.
        flags: names out of :data:`FLAGS`.
        mask: where the mask is to be found; see :mod:`pbe.data.sources.masks`. Empty: there is none.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""
    flags: frozenset[str] = frozenset()
    mask: str = ""


@dataclass(frozen=True)
class PictureRecord:
    """A picture with its boxes.

    Attributes:
        path: of the file.
        name: of the file within its source.
        width: pixels, in the frame that the boxes were drawn in.
        height: pixels.
        boxes: in pixels.
        licence: empty where not given.
        author: empty where not given.
    """

    path: Path
    name: str
    width: int
    height: int
    boxes: tuple[SourceBox, ...]
    licence: str = ""
    author: str = ""


@dataclass
class Annotations:
    """The pictures of one source that exist, and their boxes.

    Attributes:
        pictures: columns of :data:`PICTURE_COLUMNS`; width and height null where the source gives none.
        boxes: columns of :data:`BOX_COLUMNS`, sorted by ``picture`` (a row of ``pictures``).
        relative: coordinates are shares of width and height instead of pixels.
        dropped_pictures: what could not be used at all, by reason.
        dropped_boxes: likewise.
        notes: lines for the user: what was decided, and the first of the names without a file.
    """

    pictures: pl.DataFrame
    boxes: pl.DataFrame
    relative: bool
    dropped_pictures: Counter[str] = field(default_factory=Counter)
    dropped_boxes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def records(self, unreadable: list[Path] | None = None) -> Iterator[PictureRecord]:
        """Yield every picture with its boxes in pixels; sizes that are not given are read from the files.

        Args:
            unreadable: takes pictures of unknown size that cannot be opened, and are passed over.

        Raises:
            UserError: there is such a picture, and ``unreadable`` is None.
        """
        ends = box_ends(self.boxes, self.pictures.height)
        start = 0
        for row, end in zip(self.pictures.iter_rows(named=True), ends, strict=True):
            width, height = row["width"], row["height"]
            first, start = start, end
            if width is None or height is None:
                try:
                    width, height = _size_of(Path(row["path"]))
                except UserError:
                    if unreadable is None:
                        raise
                    unreadable.append(Path(row["path"]))
                    continue
            boxes = source_boxes(self.boxes.slice(first, end - first), self.relative, width, height)
            yield PictureRecord(
                path=Path(row["path"]),
                name=row["name"],
                width=width,
                height=height,
                boxes=tuple(boxes),
                licence=row["licence"] or "",
                author=row["author"] or "",
            )


def _size_of(path: Path) -> tuple[int, int]:
    from pbe.data.sources.pictures import UnreadablePictureError, inspect_picture

    try:
        header = inspect_picture(path.read_bytes())
    except (OSError, UnreadablePictureError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    return header.displayed_size


def box_ends(boxes: pl.DataFrame, pictures: int) -> list[int]:
    """Return, for each of ``pictures``, the row behind its last box."""
    ends = boxes.get_column("picture").search_sorted(pl.Series(range(pictures), dtype=pl.UInt32), "right")
    return [int(end) for end in ends.to_list()] if pictures else []


def flag_names(bits: int) -> frozenset[str]:
    """Return the names of the flags set in ``bits``."""
    return frozenset(name for name, bit in FLAG_BITS.items() if bits & bit)


def source_boxes(rows: pl.DataFrame, relative: bool, width: int, height: int) -> Iterator[SourceBox]:
    """Yield rows of a table of boxes as typed boxes in pixels of a picture of that size."""
    across, down = (width, height) if relative else (1, 1)
    for row in rows.iter_rows(named=True):
        yield SourceBox(
            x1=_number(row["x1"]) * across,
            y1=_number(row["y1"]) * down,
            x2=_number(row["x2"]) * across,
            y2=_number(row["y2"]) * down,
            label=str(row["label"] or ""),
            flags=flag_names(row["flags"]),
            mask=row["mask"] or "",
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def picture_table(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Return a table of pictures from one dict a picture; what is left out is null."""
    return pl.DataFrame(rows, schema=PICTURE_COLUMNS, orient="row")


def box_table(rows: Sequence[tuple[Any, ...]]) -> pl.DataFrame:
    """Return a table of boxes from tuples in the order of :data:`BOX_COLUMNS`, sorted by picture."""
    table = pl.DataFrame(rows, schema={**BOX_COLUMNS, "label": pl.String}, orient="row")
    return table.with_columns(pl.col("label").cast(pl.Categorical)).sort("picture", maintain_order=True)
