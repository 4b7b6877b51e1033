"""What every source yields: images and their boxes, as columns for millions and as typed records for one.

``Annotations`` holds two tables. Coordinates are either all relative (0 to 1) or all in pixels; an image's
size may be unknown until its file is opened, which :meth:`Annotations.records` does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pbe.data.sources.image_files import (
    UnreadableImageError,
    find_files,
    inspect_image,
    is_image,
    need_folder,
)
from pbe.errors import UserError

FLAGS = ("is_group_of", "is_depiction", "is_occluded", "is_truncated", "is_inside", "is_difficult")
FLAG_BITS = {name: 1 << position for position, name in enumerate(FLAGS)}
CORNERS = ("x1", "y1", "x2", "y2")
IMAGE_COLUMNS: dict[str, Any] = {
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
    "image": pl.UInt32,
    **dict.fromkeys(CORNERS, pl.Float64),
    "label": pl.Categorical,
    "flags": pl.UInt8,
    "mask": pl.String,
}


class Reason(StrEnum):
    """Why an image or a box is left out, as counts and reports name it."""

    # Of the sources
    MISSING = "image missing"
    BAD_NUMBER = "not a number"
    BAD_FLAG = "flag that is neither yes nor no"
    BAD_SIZE = "width or height that no image has"
    AMBIGUOUS_ID = "id of several images"
    AMBIGUOUS_NAME = "ambiguous name"
    OTHER_SIZES = "annotated with several sizes"
    BAD_NAME = "file name is not UTF-8"
    TWICE = "image found twice"
    AMBIGUOUS_STEM = "different images of one name"
    # Of one format
    BAD_ENTRY = "entry without id, file name or box"
    AMBIGUOUS_CATEGORY = "category with several names"
    BAD_XML = "unreadable annotation"
    CONTRADICTORY = "annotation whose name and <filename> are two images"
    OTHER_FORM = "line of another form than data.yaml says"
    ODD = "polygon with an odd number of coordinates"
    NO_SHARE = "polygon beyond 0 to 1"
    UNCLEAR_FORM = "polygon or keypoints, which data.yaml does not say"
    # Of masks
    UNUSED_MASK = "mask without an image"
    UNREADABLE_MASK = "unreadable mask"
    OTHER_MASK_SIZE = "mask of another size than its image"
    EMPTY_MASK = "empty mask"
    # Of packing
    WITHOUT_BOXES = "without boxes"
    NO_BOX_LEFT = "no box left"
    UNWANTED_LABEL = "label not wanted"
    NO_AREA = "no area"
    OUTSIDE = "outside the image"
    SMALL_AREA = "area too small"
    LARGE_AREA = "area too large"
    SHORT_SIDE = "side too short"
    ASPECT = "too elongated"
    TWO_SIZES = "annotated with two sizes by two sources"
    SAME_BOX = "the same box from two sources"
    OTHER_SIZE = "annotated for an image of another size"


class DroppedError(Exception):
    """An image, a box or a mask is left out; the text is the reason that it is counted under."""


@dataclass(frozen=True)
class SourceBox:
    """A box in pixels of its image, x2 and y2 exclusive, with what its source says about it.

    The corners may lie outside the image or be NaN (then ``mask`` gives the box). ``label`` and ``mask`` are
    empty where the source names none; :mod:`pbe.data.sources.masks` says what ``mask`` may hold.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""
    flags: frozenset[str] = frozenset()
    mask: str = ""


@dataclass(frozen=True)
class ImageRecord:
    """An image with its boxes; licence and author are empty where not given."""

    path: Path
    name: str  # of the file within its source
    width: int  # pixels, in the frame that the boxes were drawn in
    height: int
    boxes: tuple[SourceBox, ...]
    licence: str = ""
    author: str = ""


@dataclass
class Annotations:
    """The images of one source that exist, and their boxes.

    ``images`` has :data:`IMAGE_COLUMNS`, with null where the source gives no size, and ``boxes`` has
    :data:`BOX_COLUMNS`, sorted by ``image``, a row of ``images``. ``notes`` are lines for the user: what was
    decided, and the first of the names without a file.
    """

    images: pl.DataFrame
    boxes: pl.DataFrame
    relative: bool  # coordinates are shares of width and height instead of pixels
    dropped_images: Counter[str] = field(default_factory=Counter)  # what could not be used, by reason
    dropped_boxes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def records(self, unreadable: list[Path] | None = None) -> Iterator[ImageRecord]:
        """Yield every image with its boxes in pixels; sizes that are not given are read from the files.

        Images of unknown size that cannot be opened go to ``unreadable``; without it they are a UserError.
        """
        start = 0
        rows = pl.Series(range(self.images.height), dtype=pl.UInt32)
        ends = self.boxes["image"].search_sorted(rows, "right")
        for row, end in zip(self.images.iter_rows(named=True), ends.to_list(), strict=True):
            own, start = self.boxes.slice(start, end - start), end
            width, height, path = row["width"], row["height"], Path(row["path"])
            if width is None or height is None:
                try:
                    width, height = inspect_image(path.read_bytes()).displayed_size
                except (OSError, UnreadableImageError) as error:
                    if unreadable is None:
                        raise UserError(f"'{path}' cannot be read: {error}") from error
                    unreadable.append(path)
                    continue
            boxes = tuple(
                SourceBox(
                    *pixel_corners(box, (width, height) if self.relative else (1, 1)),
                    label=str(box["label"] or ""),
                    flags=flag_names(box["flags"]),
                    mask=box["mask"] or "",
                )
                for box in own.iter_rows(named=True)
            )
            licence, author = row["licence"] or "", row["author"] or ""
            yield ImageRecord(path, row["name"], width, height, boxes, licence, author)


def pixel_corners(row: Mapping[str, Any], scale: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return x1 y1 x2 y2 of a row of boxes, times the scale across and down; NaN where there is no number."""
    x1, y1, x2, y2 = (math.nan if row[name] is None else row[name] for name in CORNERS)
    return x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]


def flag_names(bits: int) -> frozenset[str]:
    """Return the names of the flags that are set in ``bits``."""
    return frozenset(name for name, bit in FLAG_BITS.items() if bits & bit)


def with_known(
    images: pl.DataFrame, sizes: Mapping[int, tuple[int, int]], licences: Mapping[int, str | None]
) -> pl.DataFrame:
    """Return the table of images with the sizes and licences of some rows; those of others are null."""
    rows = range(images.height)
    columns: dict[str, list[Any]] = {
        "width": [sizes[row][0] if row in sizes else None for row in rows],
        "height": [sizes[row][1] if row in sizes else None for row in rows],
        "licence": [licences.get(row) for row in rows],
    }
    return images.with_columns(pl.Series(name, each, IMAGE_COLUMNS[name]) for name, each in columns.items())


def find_images(
    folders: Sequence[Path], *, stems: bool = False, root: Path | None = None
) -> tuple[pl.DataFrame, Counter[str]]:
    """Return the table of all images below some folders, sorted by name, and what was dropped.

    Args:
        folders: walked in this order.
        stems: the key is the file's name without folders and ending; of files with the same key and number of
            bytes the first is taken, of others none. Else it is the name within the root, ending included.
        root: names are within this folder; with none, within each of ``folders``.
    """
    schema = {"name": pl.String, "bytes": pl.Int64}
    tables = [pl.DataFrame(schema={"path": pl.String, **schema})]
    dropped: Counter[str] = Counter()
    for folder in folders:
        files, bad = find_files(need_folder(folder, "the folder of images"))
        dropped[Reason.BAD_NAME] += bad
        start = f"{folder.relative_to(root).as_posix()}/" if root is not None and folder != root else ""
        table = pl.DataFrame([file for file in files if is_image(file[0])], schema=schema, orient="row")
        within, name = pl.lit(f"{folder}/") + pl.col("name"), pl.lit(start) + pl.col("name")
        tables.append(table.select(within.alias("path"), name.alias("name"), "bytes"))
    table = pl.concat(tables)
    stem = pl.col("name").str.replace(r"^.*/", "").str.replace(r"\.[^.]*$", "")
    table = table.with_columns((stem if stems else pl.col("name")).alias("key"))
    copies = table.select(pl.col("bytes").n_unique().over("key") == 1).to_series()
    unique = table.filter(copies).unique("key", keep="first", maintain_order=True)
    alike = int(copies.sum())
    dropped[Reason.TWICE] += alike - unique.height
    dropped[Reason.AMBIGUOUS_STEM] += table.height - alike
    absent = [
        pl.lit(None, kind).alias(name) for name, kind in IMAGE_COLUMNS.items() if name not in unique.columns
    ]
    return unique.with_columns(absent).select(list(IMAGE_COLUMNS)), +dropped


def box_table(rows: Sequence[tuple[Any, ...]]) -> pl.DataFrame:
    """Return a table of boxes from tuples in the order of :data:`BOX_COLUMNS`, sorted by image."""
    table = pl.DataFrame(rows, schema={**BOX_COLUMNS, "label": pl.String}, orient="row")
    return table.with_columns(pl.col("label").cast(pl.Categorical)).sort("image", maintain_order=True)


def take_images(
    images: pl.DataFrame, boxes: pl.DataFrame, rows: np.ndarray
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return some rows of ``images``, in the order given, and their boxes, renumbered and sorted."""
    gone = np.iinfo(np.uint32).max
    place = np.full(images.height, gone, np.uint32)
    place[rows] = np.arange(len(rows), dtype=np.uint32)
    moved = place[boxes["image"].to_numpy()]
    taken = boxes.with_columns(pl.Series("image", moved))
    if (moved == gone).any():
        taken = taken.filter(pl.col("image") != gone)
    if not taken["image"].is_sorted():  # sorting takes far more memory than the rows
        taken = taken.sort("image", maintain_order=True)
    return images[rows], taken


def drop_images(
    images: pl.DataFrame, boxes: pl.DataFrame, rows: Collection[int]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return all but some rows of ``images`` and their boxes."""
    kept = np.ones(images.height, np.bool_)
    kept[list(rows)] = False
    return take_images(images, boxes, np.flatnonzero(kept))
