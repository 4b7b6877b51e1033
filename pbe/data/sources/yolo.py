"""YOLO: ``images/`` and ``labels/``, a text an image, a line a box: class, centre, width, height.

Numbers are shares of the image's width and height. A longer line is what ``data.yaml`` says: with
``kpt_shape`` or ``task: pose`` a box and keypoints, which are left out, else a polygon (class, then x y in
turn), whose bounds are the box. Class names stand in ``classes.txt``, ``obj.names`` or ``data.yaml``.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from pbe.data.sources import parsing
from pbe.data.sources.annotations import BAD_NUMBER, MISSING, Annotations, box_table, complete, find_images
from pbe.data.sources.image_files import find_files, need_folder
from pbe.data.sources.names import AMBIGUOUS_NAME, NameMatcher
from pbe.data.sources.yolo_layout import NAME_FILES, Form, Place, class_names, find_metadata, find_places
from pbe.errors import UserError

OTHER_FORM = "line of another form than data.yaml says"
ODD = "polygon with an odd number of coordinates"
NO_SHARE = "polygon beyond 0 to 1"
UNCLEAR_FORM = "polygon or keypoints, which data.yaml does not say"
BEYOND = 0.05  # of a polygon's coordinates outside the image
NEAR = 0.02  # of a keypoint outside its box
POSES = 0.8  # of all lines of more than a box: so many that may be poses make all of them unclear


class BadLineError(Exception):
    """A line is no box; the text is the reason it is counted under."""


@dataclass(frozen=True)
class Line:
    """A line that is a box or a polygon."""

    label: int  # number of the class
    corners: tuple[float, float, float, float]  # x1 y1 x2 y2, shares
    numbers: int = 0  # how many follow the class, where they may be a polygon as well as a pose


def parse_line(line: str, form: Form) -> Line:
    """Read a line; BadLineError where it is no box."""
    words = line.split()
    label = parsing.whole(words[0])
    numbers = [parsing.number(word) for word in words[1:]]
    if label is None or len(numbers) < 4 or not all(map(math.isfinite, numbers)):
        raise BadLineError(BAD_NUMBER)
    if form.task == "pose":
        if form.keypoints and len(numbers) - 4 not in (0, form.keypoints, form.keypoints + 1):
            raise BadLineError(OTHER_FORM)
        return Line(label, _box(numbers))
    if len(numbers) in (4, 5):  # the fifth is a detector's confidence
        return Line(label, _box(numbers))
    if form.task == "obb" and len(numbers) not in (8, 9):
        raise BadLineError(OTHER_FORM)
    points = numbers[:8] if form.task == "obb" else numbers
    may_be_pose = not form.task and _may_be_pose(numbers)
    if len(points) % 2 and not may_be_pose:
        raise BadLineError(ODD)
    if not may_be_pose and (min(points) < -BEYOND or max(points) > 1 + BEYOND):
        raise BadLineError(NO_SHARE)
    bounds = min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])
    return Line(label, bounds, len(points) if may_be_pose else 0)


def _box(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = numbers[:4]
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _may_be_pose(numbers: Sequence[float]) -> bool:
    """Whether numbers can be a box inside the image and keypoints inside the box."""
    x1, y1, x2, y2 = _box(numbers)
    if x1 < -NEAR or y1 < -NEAR or x2 > 1 + NEAR or y2 > 1 + NEAR or x2 <= x1 or y2 <= y1:
        return False
    rest = numbers[4:]
    steps = [2] if len(rest) % 2 == 0 else []
    if len(rest) % 3 == 0 and set(rest[2::3]) <= {0.0, 1.0, 2.0}:  # each with its visibility
        steps.append(3)
    return any(
        all(
            (x, y) == (0, 0) or (x1 - NEAR <= x <= x2 + NEAR and y1 - NEAR <= y <= y2 + NEAR)
            for x, y in zip(rest[::step], rest[1::step], strict=True)
        )
        for step in steps
    )


@dataclass
class _Collected:
    """Rows of the table of boxes, and what was dropped."""

    names: dict[int, str]  # of classes
    form: Form  # of lines
    boxes: list[tuple[Any, ...]] = field(default_factory=list)
    unclear: list[tuple[int, Line]] = field(default_factory=list)  # may be poses, with their image's row
    polygons: int = 0  # lines with more than a box that are no poses
    dropped_images: Counter[str] = field(default_factory=Counter)
    dropped_boxes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add_line(self, row: int, line: str) -> None:
        """Take a line of an image, or count why not."""
        try:
            found = parse_line(line, self.form)
        except BadLineError as error:
            self.dropped_boxes[str(error)] += 1
            return
        if found.numbers:
            self.unclear.append((row, found))
            return
        self.polygons += len(line.split()) > 6
        self._add_box(row, found)

    def _add_box(self, row: int, line: Line) -> None:
        name = self.names.get(line.label, str(line.label))
        self.boxes.append((row, *line.corners, name, 0, None))

    def settle(self) -> bool:
        """Decide on lines that may be poses; True if they are left out."""
        lengths = {line.numbers for _, line in self.unclear}
        share = len(self.unclear) / max(len(self.unclear) + self.polygons, 1)
        left_out = len(lengths) == 1 and share >= POSES
        for row, line in self.unclear:
            if left_out:
                self.dropped_boxes[UNCLEAR_FORM] += 1
            elif line.numbers % 2 or max(line.corners) > 1 + BEYOND:
                self.dropped_boxes[ODD if line.numbers % 2 else NO_SHARE] += 1
            else:
                self._add_box(row, line)
        return left_out


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a label; damaged bytes become signs that no number holds, and are counted so."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    text = content.decode(parsing.encoding_of(content[:4]), errors="replace")
    return [line for line in text.replace("\r", "\n").split("\n") if line.strip()]


def _is_label(lines: Sequence[str], form: Form) -> bool:
    """Whether all lines are boxes: a text without an image may be a README or the like."""
    try:
        for line in lines:
            parse_line(line, form)
    except BadLineError:
        return False
    return True


def _read_place(place: Place, start: int, found: _Collected) -> pl.DataFrame:
    """Read the texts of a folder, and return its images; ``start`` is the row of the first."""
    images, dropped = find_images([place.images])
    found.dropped_images += dropped
    names = (name for name, _ in find_files(place.labels)[0] if name.lower().endswith(".txt"))
    texts = {name[:-4]: name for name in names if name.rpartition("/")[2] not in NAME_FILES}
    stems = [name.rpartition(".")[0] for name in images["name"].to_list()]
    owners = _owners(texts, stems)
    lost = []
    for stem, name in texts.items():
        rows = owners.get(stem, [])
        lines = _read_lines(place.labels / name)
        if len(rows) == 1:
            for line in lines:
                found.add_line(start + rows[0], line)
        elif (rows or _is_label(lines, found.form)) and (lines or place.labels != place.images):
            reason = AMBIGUOUS_NAME if rows else MISSING
            found.dropped_images[reason] += 1
            found.dropped_boxes[reason] += len(lines)
            lost += [] if rows else [stem]
    if lost:
        found.notes.append(NameMatcher(stems, place.images).explain(lost, place.labels))
    return images.with_columns(pl.Series("key", stems, pl.String))


def _owners(texts: Iterable[str], stems: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of the images that each text may belong to, in other letters only if none fits."""
    exact: dict[str, list[int]] = defaultdict(list)
    folded: dict[str, list[int]] = defaultdict(list)
    for row, stem in enumerate(stems):
        exact[stem].append(row)
        folded[stem.casefold()].append(row)
    owners = {stem: exact[stem] for stem in texts if stem in exact}
    taken = set(itertools.chain.from_iterable(owners.values()))
    for stem in texts:
        if stem not in owners:
            owners[stem] = [row for row in folded.get(stem.casefold(), ()) if row not in taken]
    return owners


def read_yolo(folder: Path, images: Path | None = None, split: str = "train") -> Annotations:
    """Read a YOLO folder; ``images/a/b.jpg`` belongs to ``labels/a/b.txt``.

    An image whose text is empty or missing has no boxes.

    Args:
        folder: holds ``labels/`` (or the texts themselves, then beside the images) and ``images/``; or
            splits that do, of which one is read.
        images: the folder of images, if it is another.
        split: of a set of splits: ``train``, ``validation`` or ``test``.
    """
    need_folder(folder, "the YOLO folder")
    metadata = find_metadata(folder)
    places, note = find_places(folder, images, metadata, split)
    found = _Collected(class_names(folder, places, metadata), metadata.form(), notes=[note] if note else [])
    tables: list[pl.DataFrame] = []
    for place in places:
        tables.append(_read_place(place, sum(table.height for table in tables), found))
    if found.settle():
        found.notes.append(f"'{folder}': {UNCLEAR_FORM}: write kpt_shape, or task: segment, into data.yaml")
    boxes = box_table(found.boxes)
    if found.dropped_images[MISSING] and not (boxes.height or found.dropped_boxes[UNCLEAR_FORM]):
        raise UserError(f"no image of the labels is there: {found.notes[-1]}")
    table = complete(pl.concat(tables))
    return Annotations(table, boxes, True, +found.dropped_images, +found.dropped_boxes, found.notes)
