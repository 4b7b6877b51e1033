"""Several sources as one: a file that two of them name is one image, with the boxes of both."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl

from pbe.data.sources.annotations import IMAGE_COLUMNS, Annotations

TWO_SIZES = "annotated with two sizes by two sources"
SAME_BOX = "the same box from two sources"
SIDES = ("train", "validation")
OTHER_SIDE = {"train": "in the validation set", "validation": "in the training set"}


def merge_sources(
    sources: Sequence[Annotations],
) -> tuple[pl.DataFrame, pl.DataFrame, Counter[str], Counter[str]]:
    """Return the images of all sources, each file once, their boxes, and the images and boxes dropped.

    A file that several sources name keeps its first name and key. Boxes that two sources give alike count
    once. Where the sources disagree on the size of a file, nobody knows which boxes fit: it is dropped.

    Returns:
        Columns of ``IMAGE_COLUMNS``; columns of ``BOX_COLUMNS`` and ``relative``, sorted by ``image``;
        counts by reason.
    """
    tables, boxes, offset = [], [], 0
    for found in sources:
        shift = (pl.col("image") + offset).cast(pl.UInt32)
        tables.append(found.images.select(list(IMAGE_COLUMNS)))
        boxes.append(found.boxes.with_columns(shift, pl.lit(found.relative).alias("relative")))
        offset += found.images.height
    pictures, rows = pl.concat(tables), pl.concat(boxes)
    if len(sources) == 1:
        return pictures, rows, Counter(), Counter()
    return _join_files(pictures, rows)


def _real_paths(paths: pl.Series) -> pl.Series:
    """Return paths that are equal where the files are: of folders, links and dots are resolved."""
    folders: dict[str, str] = {}
    real = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        real.append(f"{folders[folder]}/{name}")
    return pl.Series("real", real, dtype=pl.String)


def _join_files(
    pictures: pl.DataFrame, boxes: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame, Counter[str], Counter[str]]:
    table = pictures.with_columns(_real_paths(pictures["path"])).with_row_index("row")
    facts = ("width", "height", "licence", "author")
    known = [pl.col(name).drop_nulls().first().over("real").alias(name) for name in facts]
    unequal = [pl.col(name).drop_nulls().n_unique().over("real") > 1 for name in ("width", "height")]
    owner = pl.col("row").min().over("real").alias("owner")
    table = table.with_columns(owner, pl.any_horizontal(unequal).alias("unclear"), *known)
    first = table.filter(pl.col("row") == pl.col("owner"))
    kept = first.filter(~pl.col("unclear"))
    place = np.zeros(table.height, np.uint32)
    place[kept["row"].to_numpy()] = np.arange(kept.height, dtype=np.uint32)
    row = boxes["image"].to_numpy()
    unclear = table["unclear"].to_numpy()[row]
    moved = boxes.rename({"image": "row"}).with_columns(
        pl.Series("image", place[table["owner"].to_numpy()][row])
    )
    rows, same = _unique_boxes(moved.filter(~pl.Series(unclear)))
    dropped = Counter({TWO_SIZES: int(unclear.sum()), SAME_BOX: same})
    lost = Counter({TWO_SIZES: first.height - kept.height})
    return kept.select(list(IMAGE_COLUMNS)), rows.select(boxes.columns), +lost, +dropped


def _unique_boxes(boxes: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Drop boxes that an earlier source gives alike; return the rest, sorted, and how many were dropped.

    Args:
        boxes: with ``row``, the image as one of the sources has it, besides ``image``.
    """
    what = ["image", "x1", "y1", "x2", "y2", "label", "mask", "relative"]
    unique = boxes.filter(pl.col("row") == pl.col("row").min().over(what))
    return unique.sort("image", maintain_order=True), boxes.height - unique.height


def held_out(names: Iterable[str], share: float) -> np.ndarray:
    """Say of every image whether it belongs to the validation set, bool.

    The first eight bytes of the BLAKE2b hash of the name without its ending, as a share of 2 to the 64,
    lie below ``share``: neither order, nor other images, nor options change the side of an image.

    Args:
        names: of the files within their source.
        share: of the images, 0 to 1.
    """
    limit = share * 2.0**64
    stems = (os.path.splitext(name)[0].encode() for name in names)
    hashes = (hashlib.blake2b(stem, digest_size=8).digest() for stem in stems)
    return np.array([int.from_bytes(value, "big") < limit for value in hashes], np.bool_)
