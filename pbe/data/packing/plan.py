"""The packing plan: which images and boxes go into which shard, decided before any image is opened.

What needs no image is filtered here, over whole columns: labels, flags, and the area of boxes that are given
as shares. The rest follows when the image is read (:mod:`pbe.data.packing.worker`). The plan is a pair of
small files a shard, so that every shard is a task of its own that needs nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pbe.data.randomness import permutation
from pbe.data.sources.annotations import CORNERS, FLAG_BITS, Annotations, Reason, take_images
from pbe.errors import UserError
from pbe.files import atomic_write

OPTIONS = {
    Reason.SMALL_AREA: "--min-area", Reason.LARGE_AREA: "--max-area", Reason.SHORT_SIDE: "--min-side",
    Reason.ASPECT: "--max-aspect", Reason.UNWANTED_LABEL: "--label, --drop-label",
    **dict.fromkeys(FLAG_BITS, "--drop-flag"),
}  # fmt: skip
MAX_KEY = 80
EXAMPLES = 5  # of each reason
FRAMES = ("displayed", "stored")
SIDES = ("train", "validation")
OTHER_SIDE = {"train": "in the validation set", "validation": "in the training set"}


@dataclass(frozen=True)
class PackSettings:
    """What is kept and how it is packed."""

    min_area: float = 0.02  # smallest share of the image's area that a box may cover; as in the paper's code
    max_area: float = 0.8  # largest; as in the paper's code
    min_side: float = 2.0  # shortest side of a box, pixels of the image as it lies on the disk
    max_aspect: float = 0.0  # longest side over shortest; 0 for no limit
    drop_flags: tuple[str, ...] = ()  # boxes with one of them are dropped; the paper's code drops none
    labels: tuple[str, ...] = ()  # if any are named, only boxes of these are kept
    drop_labels: tuple[str, ...] = ()
    shard_pictures: int = 2000  # most images a shard
    shard_bytes: int = 512 * 2**20  # of image files, after which a shard is closed
    max_side: int = 0  # longer images are made this long and encoded again; 0 keeps every file as it is
    quality: int = 95  # of JPEGs that are encoded again
    # The frame of boxes where the sizes do not tell: "displayed" (EXIF orientation honoured, as OpenCV does)
    # or "stored".
    exif_frame: str = "displayed"
    shuffle: int | None = None  # seed of the order of images; None keeps the source's
    perceptual: bool = True  # make the hashes that near duplicates are found by
    validation_share: float = 0.0  # of the images, held out for validation by a hash of the name
    side: str = ""  # one of SIDES where a share is held out

    def check(self) -> None:
        """Raise a UserError for a value that makes no sense."""
        if not 0 <= self.min_area <= self.max_area <= 1:
            raise UserError("box areas are shares with 0 <= smallest <= largest <= 1")
        if self.min_side < 0 or self.max_side < 0 or min(self.shard_pictures, self.shard_bytes) < 1:
            raise UserError("sides must be 0 or more, and a shard holds at least one image and one byte")
        if self.max_aspect and self.max_aspect < 1:
            raise UserError("the aspect is the longest side over the shortest: 1 or more, or 0 for no limit")
        if not 1 <= self.quality <= 100:
            raise UserError("the JPEG quality must lie in 1 to 100")
        unknown = sorted(set(self.drop_flags) - set(FLAG_BITS))
        if unknown:
            raise UserError(f"there is no flag '{unknown[0]}'; there are {', '.join(FLAG_BITS)}")
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


# What plan.json holds, and the types by which it is checked.
SUMMARY: dict[str, type] = {
    "labels": list, "shards": list, "pictures_seen": int, "boxes_seen": int,
    "dropped_pictures": dict, "dropped_boxes": dict, "examples": dict,
}  # fmt: skip


@dataclass
class Plan:
    """The plan in memory; what goes into ``plan.json`` is called as it is there."""

    images: pl.DataFrame = field(default_factory=pl.DataFrame)  # in order, with box_end
    boxes: pl.DataFrame = field(default_factory=pl.DataFrame)  # label: a position in labels; and relative
    labels: list[str] = field(default_factory=list)  # sorted
    shards: list[int] = field(default_factory=list)  # end of each, in rows of images
    pictures_seen: int = 0  # image files found
    boxes_seen: int = 0  # in the annotations, those of missing images included
    dropped_pictures: Counter[str] = field(default_factory=Counter)  # images by reason
    dropped_boxes: Counter[str] = field(default_factory=Counter)  # by reason
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first that were dropped, by reason

    def summary(self) -> dict[str, Any]:
        """Return everything but the tables, as JSON has it."""
        return {name: getattr(self, name) for name in SUMMARY}


Tables = tuple[pl.DataFrame, pl.DataFrame]  # images and boxes


def add_examples(known: dict[str, list[str]], reason: str, texts: Sequence[str]) -> None:
    """Add examples of a reason to those that are known, up to :data:`EXAMPLES`."""
    if texts:
        known[reason] = [*known.get(reason, []), *texts][:EXAMPLES]


def box_text(name: str, row: Mapping[str, Any], label: str | None) -> str:
    """Return a box as an example shows it: its image, its corners as the source gives them, its label."""
    corners = " ".join("?" if row[side] is None else f"{row[side]:g}" for side in CORNERS)
    return f"{name}: {'mask' if row['mask'] else corners} {label or ''}".rstrip()


def _merge_sources(sources: Sequence[Annotations], plan: Plan) -> Tables:
    """Return the images of all sources, each file once, with their boxes, and count the rest."""
    images, boxes, offset = [], [], 0
    for found in sources:
        plan.dropped_pictures += found.dropped_images
        plan.dropped_boxes += found.dropped_boxes
        shift = (pl.col("image") + offset).cast(pl.UInt32)
        images.append(found.images)
        boxes.append(found.boxes.with_columns(shift, pl.lit(found.relative).alias("relative")))
        offset += found.images.height
    if len(sources) == 1:
        return images[0], boxes[0]
    return _join_files(pl.concat(images), pl.concat(boxes), plan)


def _join_files(images: pl.DataFrame, boxes: pl.DataFrame, plan: Plan) -> Tables:
    """Make one image of a file that several sources name, with the boxes of all.

    It keeps its first name and key. Boxes that two sources give alike count once. Where the sources disagree
    on the size of a file, nobody knows which boxes fit: it is dropped.
    """
    # Paths are equal where the files are: of folders, links and dots are resolved.
    parts = [os.path.split(path) for path in images["path"]]
    folders = {folder: os.path.realpath(folder) for folder in {folder for folder, _ in parts}}
    real = pl.Series("real", [f"{folders[folder]}/{name}" for folder, name in parts], dtype=pl.String)
    table = images.with_columns(real).with_row_index("row")
    facts = ("width", "height", "licence", "author")
    known = [pl.col(name).drop_nulls().first().over("real").alias(name) for name in facts]
    unequal = [pl.col(name).drop_nulls().n_unique().over("real") > 1 for name in ("width", "height")]
    owner = pl.col("row").min().over("real").alias("owner")
    table = table.with_columns(owner, pl.any_horizontal(unequal).alias("unclear"), *known)
    first = table.filter(pl.col("row") == pl.col("owner"))
    kept = first.filter(~pl.col("unclear"))["row"].to_numpy()
    row = boxes["image"].to_numpy()
    unclear = table["unclear"].to_numpy()[row]
    moved = boxes.rename({"image": "row"}).with_columns(
        pl.Series("image", table["owner"].to_numpy()[row], pl.UInt32)
    )
    clear = moved.filter(~pl.Series(unclear))
    what = ["image", *CORNERS, "label", "mask", "relative"]
    unique = clear.filter(pl.col("row") == pl.col("row").min().over(what)).select(boxes.columns)
    plan.dropped_pictures += Counter({Reason.TWO_SIZES: first.height - len(kept)})
    plan.dropped_boxes += Counter(
        {Reason.TWO_SIZES: int(unclear.sum()), Reason.SAME_BOX: clear.height - unique.height}
    )
    return take_images(table.select(images.columns), unique, kept)


def held_out(names: Iterable[str], share: float) -> np.ndarray:
    """Say of every image, by the name of its file within its source, whether it is for validation, bool.

    The first eight bytes of the BLAKE2b hash of the name without its ending, as a share of 2 to the 64,
    lie below ``share``: neither order, nor other images, nor options change the side of an image.
    """
    limit = share * 2.0**64
    stems = (os.path.splitext(name)[0].encode() for name in names)
    hashes = (hashlib.blake2b(stem, digest_size=8).digest() for stem in stems)
    return np.array([int.from_bytes(value, "big") < limit for value in hashes], np.bool_)


def _tests(settings: PackSettings) -> list[tuple[pl.Expr, str]]:
    """Return tests of boxes, each with the reason to drop a box for which it is the first to hold."""
    corners = [pl.col(name) for name in CORNERS]
    drawn = pl.col("mask").is_null()
    number = pl.all_horizontal([corner.is_finite().fill_null(False) for corner in corners])
    label = pl.col("label").cast(pl.String)
    tests: list[tuple[pl.Expr, str]] = [(drawn & ~number, Reason.BAD_NUMBER)]
    if settings.labels:
        tests.append((~label.is_in(settings.labels), Reason.UNWANTED_LABEL))
    if settings.drop_labels:
        tests.append((label.is_in(settings.drop_labels), Reason.UNWANTED_LABEL))
    tests += [((pl.col("flags") & FLAG_BITS[flag]) != 0, flag) for flag in settings.drop_flags]
    # Shares of an image's sides can be measured before it is opened.
    share = drawn & pl.col("relative")
    x1, y1, x2, y2 = (corner.clip(0.0, 1.0) for corner in corners)
    width, height = x2 - x1, y2 - y1
    hollow = (corners[2] <= corners[0]) | (corners[3] <= corners[1])
    return [
        *tests,
        (share & hollow, Reason.NO_AREA),
        (share & ((width <= 0) | (height <= 0)), Reason.OUTSIDE),
        (share & (width * height < settings.min_area), Reason.SMALL_AREA),
        (share & (width * height > settings.max_area), Reason.LARGE_AREA),
    ]


def _keep_boxes(
    images: pl.DataFrame, boxes: pl.DataFrame, settings: PackSettings, plan: Plan
) -> pl.DataFrame:
    """Return the boxes that are left, and count the others."""
    tests = _tests(settings)
    chain: pl.Expr = pl.lit(0, pl.UInt8)  # or the number, from 1 on, of the first test that holds
    for number, (test, _) in reversed(list(enumerate(tests, 1))):
        chain = pl.when(test).then(pl.lit(number, pl.UInt8)).otherwise(chain)
    first = boxes.select(chain).to_series()
    counts = np.bincount(first.to_numpy(), minlength=len(tests) + 1).tolist()
    for number, (_, reason) in enumerate(tests, 1):
        plan.dropped_boxes[reason] += counts[number]
        if not counts[number]:
            continue
        shown = boxes.filter(first == number).head(EXAMPLES)
        rows = zip(images["name"].gather(shown["image"]), shown.iter_rows(named=True), strict=True)
        add_examples(plan.examples, reason, [box_text(name, row, row["label"]) for name, row in rows])
    return boxes.filter(first == 0)


def _filter(images: pl.DataFrame, boxes: pl.DataFrame, settings: PackSettings, plan: Plan) -> Tables:
    """Return the images and boxes that are left, and count the rest."""
    if settings.side:
        wanted = held_out(images["name"], settings.validation_share) == (settings.side == SIDES[1])
        before = boxes.height
        images, boxes = take_images(images, boxes, np.flatnonzero(wanted))
        plan.dropped_pictures[OTHER_SIDE[settings.side]] += int((~wanted).sum())
        plan.dropped_boxes[OTHER_SIDE[settings.side]] += before - boxes.height
    left = _keep_boxes(images, boxes, settings, plan)
    with_boxes, with_left = np.zeros((2, images.height), np.bool_)
    with_boxes[boxes["image"].unique().to_numpy()] = True
    with_left[left["image"].unique().to_numpy()] = True
    for reason, lost in ((Reason.WITHOUT_BOXES, ~with_boxes), (Reason.NO_BOX_LEFT, with_boxes & ~with_left)):
        plan.dropped_pictures[reason] += int(lost.sum())
        shown = images["name"].gather(np.flatnonzero(lost)[:EXAMPLES])
        add_examples(plan.examples, reason, shown.to_list())
    return take_images(images, left, np.flatnonzero(with_left))


def _unique_keys(images: pl.DataFrame) -> pl.DataFrame:
    """Make keys plain (WebDataset splits at dots) and unique; what changes gets a hash of the path."""
    names = images["key"].str.replace_all("/", "__").str.replace_all(r"[^A-Za-z0-9_-]", "_")
    keys = names.str.slice(0, MAX_KEY)
    rows = (keys.is_duplicated() | (keys.str.len_chars() >= MAX_KEY) | (keys == "")).arg_true()
    changed = []
    for key, path in zip(keys.gather(rows), images["path"].gather(rows), strict=True):
        # The path tells apart what two sources call the same.
        suffix = hashlib.blake2b(path.encode(), digest_size=8).hexdigest()
        changed.append(f"{key[: MAX_KEY - 17]}-{suffix}")
    keys = keys.scatter(rows, pl.Series(changed, dtype=pl.String))
    if keys.n_unique() != len(keys):
        raise UserError("an image is listed twice by its source; remove one of its entries")
    return images.with_columns(keys)


def _shard_ends(sizes: np.ndarray, settings: PackSettings) -> list[int]:
    ends: list[int] = []
    start = total = 0
    for end, size in enumerate(sizes.tolist(), 1):
        total += size
        if end - start >= settings.shard_pictures or total >= settings.shard_bytes or end == len(sizes):
            ends.append(end)
            start, total = end, 0
    return ends


def _number_labels(labels: pl.Series) -> tuple[list[str], pl.Series]:
    """Return the labels, sorted, and for each box the position of its own, int32; no label counts as empty.

    Goes by categories: text would take several times the memory of the boxes.
    """
    present = labels.unique()
    texts = present.cast(pl.String).fill_null("").to_list()
    names = sorted(set(texts))
    numbers = {name: number for number, name in enumerate(names)}
    return names, labels.replace_strict(present, [numbers[text] for text in texts], return_dtype=pl.Int32)


def make_plan(sources: Sequence[Annotations], settings: PackSettings) -> Plan:
    """Filter, order and cut; the same sources and settings give the same plan.

    Where nothing is left to pack, the plan has no shards, and counts why.
    """
    plan = Plan()
    images, boxes = _merge_sources(sources, plan)
    plan.pictures_seen = images.height + plan.dropped_pictures.total()
    plan.boxes_seen = boxes.height + plan.dropped_boxes.total()
    images, boxes = _filter(images, boxes, settings, plan)
    plan.dropped_pictures, plan.dropped_boxes = +plan.dropped_pictures, +plan.dropped_boxes
    if not images.height:
        return plan
    images = _unique_keys(images)
    if settings.shuffle is not None:
        order = permutation(images.height, settings.shuffle, "packing")
        images, boxes = take_images(images, boxes, order)
    plan.labels, label = _number_labels(boxes["label"])
    counts = np.bincount(boxes["image"].to_numpy(), minlength=images.height)
    plan.images = images.with_columns(pl.Series("box_end", np.cumsum(counts)))
    plan.boxes = boxes.with_columns(label).drop("image")
    plan.shards = _shard_ends(images["bytes"].to_numpy(), settings)
    return plan


def save_plan(plan: Plan, folder: Path) -> None:
    """Write the plan; ``plan.json`` comes last, so that a folder that has it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    start = first_box = 0
    for number, end in enumerate(plan.shards):
        images = plan.images.slice(start, end - start)
        boxes = plan.boxes.slice(first_box, images["box_end"][-1] - first_box)
        images = images.with_columns(pl.col("box_end") - first_box)
        for kind, table in (("pictures", images), ("boxes", boxes)):
            buffer = io.BytesIO()
            table.write_ipc(buffer, compression="uncompressed")
            atomic_write(folder / f"{number:06d}.{kind}.arrow", buffer.getvalue(), sync=True)
        start, first_box = end, first_box + boxes.height
    atomic_write(folder / "plan.json", json.dumps(plan.summary()), sync=True)


def load_task(folder: Path, number: int) -> Tables:
    """Return the images and the boxes of shard ``number`` of a plan."""
    paths = [folder / f"{number:06d}.{kind}.arrow" for kind in ("pictures", "boxes")]
    try:
        images, boxes = (pl.read_ipc(io.BytesIO(path.read_bytes())) for path in paths)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"the plan in '{folder}' is damaged; start anew with --overwrite") from error
    return images, boxes
