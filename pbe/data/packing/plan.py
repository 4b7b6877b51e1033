"""The packing plan: which pictures and boxes go into which shard, decided before any picture is opened.

What needs no picture is filtered here, over whole columns: labels, flags, and the area of boxes that are
given as shares. The rest follows when the image is read (:mod:`pbe.data.packing.worker`). The plan is a pair
of small files a shard, so that every shard is a task of its own that needs nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pbe.data.packing.index import write_whole
from pbe.data.packing.merge import OTHER_SIDE, SIDES, held_out, merge_sources
from pbe.data.packing.tally import EXAMPLES, add_examples, box_text
from pbe.data.randomness import permutation
from pbe.data.sources.annotations import BAD_NUMBER, FLAG_BITS, FLAGS, Annotations
from pbe.errors import UserError

WITHOUT_BOXES = "without boxes"
NO_BOX_LEFT = "no box left"
UNWANTED_LABEL = "label not wanted"
NO_AREA = "no area"
OUTSIDE = "outside the image"
SMALL_AREA = "area too small"
LARGE_AREA = "area too large"
SHORT_SIDE = "side too short"
ASPECT = "too elongated"
OPTIONS = {
    SMALL_AREA: "--min-area", LARGE_AREA: "--max-area", SHORT_SIDE: "--min-side", ASPECT: "--max-aspect",
    UNWANTED_LABEL: "--label, --drop-label", **dict.fromkeys(FLAGS, "--drop-flag"),
}  # fmt: skip
MAX_KEY = 80
FRAMES = ("displayed", "stored")
SUMMARY: dict[str, type] = {
    "labels": list,
    "shards": list,
    "pictures_seen": int,
    "boxes_seen": int,
    "dropped_pictures": dict,
    "dropped_boxes": dict,
    "examples": dict,
}


@dataclass(frozen=True)
class PackSettings:
    """What is kept and how it is packed.

    Attributes:
        min_area: smallest share of the picture's area that a box may cover; the paper's code has 0.02.
        max_area: largest; the paper's code has 0.8.
        min_side: shortest side of a box, pixels of the picture as it lies on the disk.
        max_aspect: longest side over shortest; 0 for no limit.
        drop_flags: boxes with one of these flags are dropped; the paper's code drops none.
        labels: if any are named, only boxes of these labels are kept.
        drop_labels: boxes of these labels are dropped.
        shard_pictures: most pictures a shard.
        shard_bytes: bytes of picture files after which a shard is closed.
        max_side: longer pictures are made this long and encoded again; 0 keeps every file as it is.
        quality: of JPEGs that are encoded again.
        exif_frame: the frame of boxes where the sizes do not tell: ``displayed`` (EXIF orientation
            honoured, as OpenCV does) or ``stored``.
        shuffle: seed of the order of pictures; None keeps the source's.
        perceptual: make the hashes that near duplicates are found by.
        validation_share: share of the images that is held out for validation, by a hash of the name.
        side: ``train`` or ``validation``, where a share is held out; else empty.
    """

    min_area: float = 0.02
    max_area: float = 0.8
    min_side: float = 2.0
    max_aspect: float = 0.0
    drop_flags: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    drop_labels: tuple[str, ...] = ()
    shard_pictures: int = 2000
    shard_bytes: int = 512 * 2**20
    max_side: int = 0
    quality: int = 95
    exif_frame: str = "displayed"
    shuffle: int | None = None
    perceptual: bool = True
    validation_share: float = 0.0
    side: str = ""

    def check(self) -> None:
        """Raise a UserError for a value that makes no sense."""
        if not 0 <= self.min_area <= self.max_area <= 1:
            raise UserError("box areas are shares with 0 <= smallest <= largest <= 1")
        if self.min_side < 0 or self.max_side < 0 or min(self.shard_pictures, self.shard_bytes) < 1:
            raise UserError("sides must be 0 or more, and a shard holds at least one picture and one byte")
        if self.max_aspect and self.max_aspect < 1:
            raise UserError("the aspect is the longest side over the shortest: 1 or more, or 0 for no limit")
        if not 1 <= self.quality <= 100:
            raise UserError("the JPEG quality must lie in 1 to 100")
        unknown = sorted(set(self.drop_flags) - set(FLAGS))
        if unknown:
            raise UserError(f"there is no flag '{unknown[0]}'; there are {', '.join(FLAGS)}")
        if self.exif_frame not in FRAMES:
            raise UserError(f"the EXIF frame is '{self.exif_frame}'; it must be displayed or stored")
        if self.side and not (self.side in SIDES and 0 < self.validation_share < 1):
            raise UserError("the validation share must lie between 0 and 1, as 0.05 does")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them; those of a split only where there is one."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        if not self.side:
            del settings["validation_share"], settings["side"]
        return settings


@dataclass
class Plan:
    """The plan in memory.

    Attributes:
        pictures: a row a picture, in order, with ``box_end``.
        boxes: their boxes, ``label`` a position in ``labels``, each with whether it is ``relative``.
        labels: sorted.
        shards: end of each shard, in rows of ``pictures``.
        pictures_seen: files found.
        boxes_seen: boxes that the annotations hold, those of missing pictures included.
        dropped_pictures: by reason.
        dropped_boxes: by reason.
        examples: by reason, the first images or boxes that were dropped for it.
    """

    pictures: pl.DataFrame
    boxes: pl.DataFrame
    labels: list[str]
    shards: list[int]
    pictures_seen: int
    boxes_seen: int
    dropped_pictures: Counter[str] = field(default_factory=Counter)
    dropped_boxes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return everything but the tables, as JSON has it."""
        return {name: getattr(self, name) for name in SUMMARY}


def _reasons(settings: PackSettings) -> list[tuple[pl.Expr, str]]:
    """Return tests of boxes, each with the reason to drop a box for which it is the first to hold."""
    corners = [pl.col(name) for name in ("x1", "y1", "x2", "y2")]
    drawn = pl.col("mask").is_null()
    number = pl.all_horizontal([corner.is_finite().fill_null(False) for corner in corners])
    label = pl.col("label").cast(pl.String)
    tests: list[tuple[pl.Expr, str]] = [(drawn & ~number, BAD_NUMBER)]
    if settings.labels:
        tests.append((~label.is_in(settings.labels), UNWANTED_LABEL))
    if settings.drop_labels:
        tests.append((label.is_in(settings.drop_labels), UNWANTED_LABEL))
    tests += [((pl.col("flags") & FLAG_BITS[flag]) != 0, flag) for flag in settings.drop_flags]
    # Shares of a picture's sides can be measured before it is opened.
    share = drawn & pl.col("relative")
    x1, y1, x2, y2 = (corner.clip(0.0, 1.0) for corner in corners)
    width, height = x2 - x1, y2 - y1
    hollow = (corners[2] <= corners[0]) | (corners[3] <= corners[1])
    return [
        *tests,
        (share & hollow, NO_AREA),
        (share & ((width <= 0) | (height <= 0)), OUTSIDE),
        (share & (width * height < settings.min_area), SMALL_AREA),
        (share & (width * height > settings.max_area), LARGE_AREA),
    ]


def _first_reason(tests: Sequence[tuple[pl.Expr, str]]) -> pl.Expr:
    """Return an expression that is 0, or the number, from 1 on, of the first test that holds; uint8."""
    chain: pl.Expr = pl.lit(0, pl.UInt8)
    for number, (test, _) in reversed(list(enumerate(tests, 1))):
        chain = pl.when(test).then(pl.lit(number, pl.UInt8)).otherwise(chain)
    return chain


def _drop_boxes(pictures: pl.DataFrame, boxes: pl.DataFrame, settings: PackSettings, plan: Plan) -> pl.Series:
    """Return which boxes are left, bool, and count the others."""
    tests = _reasons(settings)
    first = boxes.select(_first_reason(tests)).to_series()
    counts = np.bincount(first.to_numpy(), minlength=len(tests) + 1).tolist()
    for number, ((_, reason), count) in enumerate(zip(tests, counts[1:], strict=True), 1):
        plan.dropped_boxes[reason] += count
        if count:
            shown = boxes.filter(first == number).head(EXAMPLES)
            names = pictures["name"].gather(shown["image"]).to_list()
            rows = zip(names, shown.iter_rows(named=True), strict=True)
            add_examples(plan.examples, {reason: [box_text(name, row, row["label"]) for name, row in rows]})
    return first == 0


def _keep_side(
    pictures: pl.DataFrame, boxes: pl.DataFrame, settings: PackSettings, plan: Plan
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the images of one side of a split with their boxes, and count the rest."""
    if not settings.side:
        return pictures, boxes
    wanted = held_out(pictures["name"], settings.validation_share) == (settings.side == SIDES[1])
    kept = boxes.filter(pl.Series(wanted[boxes["image"].to_numpy()]))
    plan.dropped_pictures[OTHER_SIDE[settings.side]] += int((~wanted).sum())
    plan.dropped_boxes[OTHER_SIDE[settings.side]] += boxes.height - kept.height
    return _take(pictures, kept, np.flatnonzero(wanted))


def _take(pictures: pl.DataFrame, boxes: pl.DataFrame, kept: np.ndarray) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return some rows of ``pictures``, and all of ``boxes``, which belong to them, with the new numbers."""
    rows = np.zeros(pictures.height, np.uint32)
    rows[kept] = np.arange(len(kept), dtype=np.uint32)
    return pictures[kept], boxes.with_columns(pl.Series("image", rows[boxes["image"].to_numpy()]))


def _filter(
    pictures: pl.DataFrame, boxes: pl.DataFrame, settings: PackSettings, plan: Plan
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the pictures and boxes that are left, and count the rest."""
    pictures, boxes = _keep_side(pictures, boxes, settings, plan)
    annotated = boxes["image"].unique()
    left = boxes.filter(_drop_boxes(pictures, boxes, settings, plan))
    kept = left["image"].unique().sort()
    with_boxes, with_left = np.zeros((2, pictures.height), np.bool_)
    with_boxes[annotated.to_numpy()], with_left[kept.to_numpy()] = True, True
    for reason, lost in ((WITHOUT_BOXES, ~with_boxes), (NO_BOX_LEFT, with_boxes & ~with_left)):
        plan.dropped_pictures[reason] += int(lost.sum())
        shown = pictures["name"].gather(np.flatnonzero(lost)[:EXAMPLES])
        add_examples(plan.examples, {reason: shown.to_list()} if len(shown) else {})
    return _take(pictures, left, kept.to_numpy())


def _unique_keys(pictures: pl.DataFrame) -> pl.DataFrame:
    """Make keys plain (WebDataset splits at dots) and unique; what changes gets a hash of the name."""
    plain = pl.col("key").str.replace_all("/", "__").str.replace_all(r"[^A-Za-z0-9_-]", "_")
    table = pictures.with_columns(plain.str.slice(0, MAX_KEY).alias("plain"))
    odd = (
        table["plain"].is_duplicated() | (table["plain"].str.len_chars() >= MAX_KEY) | (table["plain"] == "")
    )
    keys = table["plain"].rename("key")
    rows = odd.arg_true()
    changed = []
    for key, path in table.select("plain", "path")[rows].iter_rows():
        # The path tells apart what two sources call the same.
        suffix = hashlib.blake2b(path.encode(), digest_size=8).hexdigest()
        changed.append(f"{key[: MAX_KEY - 17]}-{suffix}")
    keys = keys.scatter(rows, pl.Series(changed, dtype=pl.String))
    if keys.n_unique() != len(keys):
        raise UserError("an image is listed twice by its source; remove one of its entries")
    return table.drop("plain").with_columns(keys)


def _shard_ends(sizes: np.ndarray, settings: PackSettings) -> list[int]:
    ends: list[int] = []
    start = total = 0
    for row, size in enumerate(sizes.tolist()):
        total += size
        if row + 1 - start >= settings.shard_pictures or total >= settings.shard_bytes:
            ends.append(row + 1)
            start, total = row + 1, 0
    return ends if not len(sizes) or (ends and ends[-1] == len(sizes)) else [*ends, len(sizes)]


def _ordered(
    pictures: pl.DataFrame, boxes: pl.DataFrame, order: np.ndarray
) -> tuple[pl.DataFrame, pl.DataFrame]:
    place = np.empty(len(order), np.uint32)
    place[order] = np.arange(len(order), dtype=np.uint32)
    moved = boxes.with_columns(pl.Series("image", place[boxes["image"].to_numpy()]))
    return pictures[order], moved.sort("image", maintain_order=True)


def _number_labels(labels: pl.Series) -> tuple[list[str], pl.Series]:
    """Return the labels, sorted, and for each box the position of its own, int32; no label counts as empty.

    Goes by the codes of the categories: text would take several times the memory of the boxes.
    """
    present = labels.unique()
    texts = present.cast(pl.String).fill_null("").to_list()
    names = sorted(set(texts))
    numbers = {name: number for number, name in enumerate(names)}
    codes = present.to_physical().cast(pl.Int64).fill_null(-1).to_list()
    table = np.zeros(max(codes, default=0) + 2, np.int32)  # the last one is that of null
    for code, text in zip(codes, texts, strict=True):
        table[code] = numbers[text]
    rows = labels.to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
    return names, pl.Series("label", table[rows])


def make_plan(sources: Sequence[Annotations], settings: PackSettings) -> Plan:
    """Filter, order and cut; the same sources and settings give the same plan.

    Where nothing is left to pack, the plan has no shards, and counts why.
    """
    pictures, boxes, lost_pictures, lost_boxes = merge_sources(sources)
    plan = Plan(pl.DataFrame(), pl.DataFrame(), [], [], 0, 0, lost_pictures, lost_boxes)
    for found in sources:
        plan.dropped_pictures += found.dropped_images
        plan.dropped_boxes += found.dropped_boxes
    plan.pictures_seen = pictures.height + plan.dropped_pictures.total()
    plan.boxes_seen = boxes.height + plan.dropped_boxes.total()
    pictures, boxes = _filter(pictures, boxes, settings, plan)
    plan.dropped_pictures, plan.dropped_boxes = +plan.dropped_pictures, +plan.dropped_boxes
    if not pictures.height:
        return plan
    pictures = _unique_keys(pictures)
    if settings.shuffle is not None:
        order = permutation(pictures.height, settings.shuffle, "packing")
        pictures, boxes = _ordered(pictures, boxes, order)
    plan.labels, label = _number_labels(boxes["label"])
    counts = np.bincount(boxes["image"].to_numpy(), minlength=pictures.height)
    plan.pictures = pictures.with_columns(pl.Series("box_end", np.cumsum(counts)))
    plan.boxes = boxes.with_columns(label).drop("image")
    plan.shards = _shard_ends(pictures["bytes"].to_numpy(), settings)
    return plan


def _write_table(path: Path, table: pl.DataFrame) -> None:
    buffer = io.BytesIO()
    table.write_ipc(buffer, compression="uncompressed")
    write_whole(path, buffer.getvalue())


def save_plan(plan: Plan, folder: Path) -> None:
    """Write the plan; ``plan.json`` comes last, so that a folder that has it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [0, *plan.shards]
    box_ends = [0, *(plan.pictures["box_end"].gather([end - 1 for end in plan.shards]).to_list())]
    for number in range(len(plan.shards)):
        start, end = ends[number], ends[number + 1]
        pictures = plan.pictures.slice(start, end - start).with_columns(pl.col("box_end") - box_ends[number])
        _write_table(folder / f"{number:06d}.pictures.arrow", pictures)
        boxes = plan.boxes.slice(box_ends[number], box_ends[number + 1] - box_ends[number])
        _write_table(folder / f"{number:06d}.boxes.arrow", boxes)
    write_whole(folder / "plan.json", json.dumps(plan.summary()).encode())


def load_task(folder: Path, number: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the pictures and the boxes of shard ``number`` of a plan."""
    names = [folder / f"{number:06d}.{kind}.arrow" for kind in ("pictures", "boxes")]
    try:
        pictures, boxes = (pl.read_ipc(io.BytesIO(path.read_bytes())) for path in names)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"the plan in '{folder}' is damaged; start anew with --overwrite") from error
    return pictures, boxes
