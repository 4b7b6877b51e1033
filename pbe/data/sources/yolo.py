"""YOLO: ``images/`` and ``labels/``, a text an image, a line a box: class, centre, width, height.

Numbers are shares of the image's width and height. A longer line is what ``data.yaml`` says: with
``kpt_shape`` or ``task: pose`` a box and keypoints, which are left out, else a polygon (class, then x y in
turn), whose bounds are the box. Class names stand in ``classes.txt``, ``obj.names`` or ``data.yaml``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from pbe.data.sources.annotations import Annotations, DroppedError, Reason, box_table, find_images
from pbe.data.sources.image_files import find_files, need_folder
from pbe.data.sources.names import NameMatcher
from pbe.data.sources.parsing import encoding_of, number, read_text, read_yaml, shown, whole
from pbe.errors import UserError

NAME_FILES = ("classes.txt", "obj.names")
YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
NOTHING = ("", "~", "null")  # YAML's ways to write that there is no value
TASKS = ("detect", "segment", "pose", "obb")
BEYOND = 0.05  # of a polygon's coordinates outside the image
NEAR = 0.02  # of a keypoint outside its box
POSES = 0.8  # of all lines of more than a box: so many that may be poses make all of them unclear

Corners = tuple[float, float, float, float]  # x1 y1 x2 y2, shares
Place = tuple[Path, Path]  # a folder of images and that of their texts, which may be the same


class Form(NamedTuple):
    """What ``data.yaml`` says of a line of a label; empty and 0 where it says nothing."""

    task: str = ""  # one of TASKS
    keypoints: int = 0  # numbers that follow the box of a pose


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Metadata:
    """A ``data.yaml``: its path and what it holds; None and nothing where there is none."""

    path: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)

    def form(self) -> Form:
        """Return what it says of the labels."""
        task, shape = self.values.get("task", ""), self.values.get("kpt_shape")
        task = "" if task in NOTHING else task
        if task and task not in TASKS:
            raise UserError(f"'{self.path}': task is {shown(task)}; it must be one of {', '.join(TASKS)}")
        if shape in (None, *NOTHING):
            return Form(task)
        numbers = [whole(value) for value in shape] if isinstance(shape, list) else []
        if len(numbers) != 2 or not numbers[0] or numbers[0] < 1 or numbers[1] not in (2, 3):
            raise UserError(
                f"'{self.path}': kpt_shape is {shown(shape)}; it must be [keypoints, 2] or [keypoints, 3]"
            )
        return Form(task or "pose", numbers[0] * numbers[1])

    def class_names(self) -> dict[int, str]:
        """Return names by class number."""
        names = self.values.get("names")
        pairs = list(names.items()) if isinstance(names, dict) else list(enumerate(names or ()))
        if not isinstance(names, list | dict) or not pairs:
            raise UserError(f"'{self.path}' holds no readable list 'names' of classes")
        found: dict[int, str] = {}
        for key, name in pairs:
            number = whole(key)
            if number is None or not isinstance(name, str):
                raise UserError(
                    f"'{self.path}': 'names' holds {shown(f'{key}: {name}')}, not a number and a name"
                )
            found[number] = name
        return found

    def split(self, split: str) -> list[str]:
        """Return the folders of images that it names for a split; none where it names none."""
        key = next((key for key in SPLITS.get(split, ()) if self.values.get(key)), None)
        paths = _as_list(self.values[key]) if key else []
        if not all(isinstance(path, str) for path in paths):
            raise UserError(f"'{self.path}': {key} is neither a path nor a list of paths")
        if any(path.lower().endswith(".txt") for path in paths):
            raise UserError(
                f"'{self.path}': {key} is a list of images, {shown(paths[0])};"
                " name their folder instead: yolo:FOLDER@IMAGES"
            )
        return paths

    def resolve(self, folder: Path, path: str) -> Path | None:
        """Return the folder that a path means: as it stands, or, written elsewhere, by its last parts."""
        root, path = (text.replace("\\", "/") for text in (str(self.values.get("path") or ""), path))
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        ends = [folder.joinpath(*parts[start:]) for start in range(len(parts))]
        found = next((each for each in (folder / root / path, folder / path, *ends) if each.is_dir()), None)
        whole_set = found and (found / "images").is_dir() and (found / "labels").is_dir()
        return found / "images" if found and whole_set else found


def _find_metadata(folder: Path) -> Metadata:
    """Return the ``data.yaml`` of a set: in its folder, or above it where that names it as a split."""
    for name in YAML_NAMES:
        if (folder / name).is_file():
            return Metadata(folder / name, read_yaml(folder / name))
    others = [path for ending in ("yaml", "yml") for path in sorted(folder.glob(f"*.{ending}"))]
    read = {path: read_yaml(path) for path in others if not path.name.startswith(".")}
    named = [path for path, values in read.items() if "names" in values]
    if len(named) > 1:
        raise UserError(
            f"'{folder}' holds several files with names of classes: {named[0].name}, {named[1].name}"
        )
    if named:
        return Metadata(named[0], read[named[0]])
    for above in folder.resolve().parents[:2]:
        own = set(folder.resolve().relative_to(above).parts) - {"images", "labels"}
        for path in (above / name for name in YAML_NAMES if (above / name).is_file()):
            values = read_yaml(path)
            folders = [each for keys in SPLITS.values() for key in keys for each in _as_list(values.get(key))]
            if any(own <= set(re.split(r"[/\\]", each)) for each in folders if isinstance(each, str)):
                return Metadata(path, values)
    return Metadata()


def _class_names(folder: Path, places: Sequence[Place], metadata: Metadata) -> dict[int, str]:
    """Return names by class number, of ``classes.txt``, ``obj.names`` or ``data.yaml``; empty without one."""
    folders = dict.fromkeys((folder, folder / "labels", *(labels for _, labels in places)))
    paths = [place / name for place in folders for name in NAME_FILES if (place / name).is_file()]
    found = {path: dict(enumerate(line.strip() for line in read_text(path).split("\n"))) for path in paths}
    if metadata.path and (not found or "names" in metadata.values):
        found[metadata.path] = metadata.class_names()
    names: dict[int, tuple[str, Path]] = {}
    for path, numbered in found.items():
        for label, name in numbered.items():
            known, source = names.setdefault(label, (name, path)) if name else ("", path)
            if known != name:
                raise UserError(
                    f"class {label} is {shown(known)} in '{source}' and {shown(name)} in '{path}';"
                    " make them agree, or leave one of the files there"
                )
    return {label: name for label, (name, _) in names.items()}


def _find_places(
    folder: Path, images: Path | None, metadata: Metadata, split: str
) -> tuple[list[Place], str]:
    """Return the folders of images and labels, and a note on the split where one was chosen.

    Of splits one is read: of those that ``data.yaml`` names (``images/train``, or ``train/images``), or of
    folders that hold ``images/`` and ``labels/``. Without any, ``images/`` and ``labels/`` are read whole.
    """
    labels = folder / "labels"
    if images is not None:
        return [(images, labels if labels.is_dir() else folder)], ""
    if metadata.path is not None and metadata.path.parent != folder:
        metadata = Metadata()
    if labels.is_dir():
        return _inner_places(folder, metadata, split)
    named = metadata.split(split)
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    splits = [path.name for path in inner if (path / "images").is_dir() and (path / "labels").is_dir()]
    found = [metadata.resolve(folder, path) for path in named]
    lost = next((path for path, place in zip(named, found, strict=True) if place is None), None)
    if named and lost is None:
        places = [(path, _labels_of(path)) for path in found if path is not None]
        return places, f"'{folder}': the split {split} of {metadata.path}, {shown(', '.join(named))}"
    if named and (splits or not any(folder.rglob("*.txt"))):
        raise UserError(
            f"'{metadata.path}' names {shown(lost)} for {split}, which is not there;"
            f" name a folder with images/ and labels/: yolo:{folder}/{next(iter(splits), 'train')}"
        )
    wanted = next((folder / name for name in SPLITS.get(split, ()) if name in splits), None)
    if wanted:
        return [(wanted / "images", wanted / "labels")], f"'{folder}': the split {wanted.name}"
    if splits:
        raise UserError(f"'{folder}' holds {', '.join(splits)}; name one: yolo:{folder / splits[0]}")
    return [(folder, folder)], ""


def _inner_places(folder: Path, metadata: Metadata, split: str) -> tuple[list[Place], str]:
    """Return the folders of a split within ``images/`` and ``labels/``, or the two themselves."""
    values = [metadata.values.get(key) for key in SPLITS.get(split, ())]
    named = [path for value in values for path in _as_list(value) if path]
    texts = [path for path in named if isinstance(path, str)]
    images = (folder / "images").resolve()
    found = [path.resolve() for path in (metadata.resolve(folder, text) for text in texts) if path]
    ends = [path.relative_to(images) for path in found if images in path.parents]
    if ends and len(ends) == len(named):
        places = [(folder / "images" / end, folder / "labels" / end) for end in ends]
        return places, f"'{folder}': the split {split} of {metadata.path}, {shown(', '.join(named))}"
    lists = any(text.lower().endswith(".txt") for text in texts)
    note = f"'{folder}': all of images/ is read, not a split {split}" if lists or split != "train" else ""
    return [(folder / "images", folder / "labels")], note


def _labels_of(images: Path) -> Path:
    """Return where the labels of a folder of images lie: in ``labels`` instead of ``images``, or there."""
    parts = list(images.parts)
    if "images" not in parts:
        return images / "labels" if (images / "labels").is_dir() else images
    last = len(parts) - 1 - parts[::-1].index("images")
    labels = Path(*parts[:last], "labels", *parts[last + 1 :])
    return labels if labels.is_dir() else images


def _parse_line(line: str, form: Form) -> tuple[int, Corners, int]:
    """Return class and box of a line, and how many numbers it has if they may be a pose as well, else 0."""
    words = line.split()
    label = whole(words[0])
    numbers = [number(word) for word in words[1:]]
    if label is None or len(numbers) < 4 or not all(map(math.isfinite, numbers)):
        raise DroppedError(Reason.BAD_NUMBER)
    if form.task == "pose":
        if form.keypoints and len(numbers) - 4 not in (0, form.keypoints, form.keypoints + 1):
            raise DroppedError(Reason.OTHER_FORM)
        return label, _box(numbers), 0
    if len(numbers) in (4, 5):  # the fifth is a detector's confidence
        return label, _box(numbers), 0
    if form.task == "obb" and len(numbers) not in (8, 9):
        raise DroppedError(Reason.OTHER_FORM)
    points = numbers[:8] if form.task == "obb" else numbers
    may_be_pose = not form.task and _may_be_pose(numbers)
    if len(points) % 2 and not may_be_pose:
        raise DroppedError(Reason.ODD)
    if not may_be_pose and (min(points) < -BEYOND or max(points) > 1 + BEYOND):
        raise DroppedError(Reason.NO_SHARE)
    bounds = min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])
    return label, bounds, len(points) if may_be_pose else 0


def _box(numbers: Sequence[float]) -> Corners:
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
    form: Form
    boxes: list[tuple[Any, ...]] = field(default_factory=list)
    # May be poses: row of the image, class, box, numbers.
    unclear: list[tuple[int, int, Corners, int]] = field(default_factory=list)
    polygons: int = 0  # lines with more than a box that are no poses
    dropped_images: Counter[str] = field(default_factory=Counter)
    dropped_boxes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add_line(self, row: int, line: str) -> None:
        """Take a line of an image, or count why not."""
        try:
            label, corners, numbers = _parse_line(line, self.form)
        except DroppedError as error:
            self.dropped_boxes[str(error)] += 1
            return
        if numbers:
            self.unclear.append((row, label, corners, numbers))
        else:
            self.polygons += len(line.split()) > 6
            self._add_box(row, label, corners)

    def _add_box(self, row: int, label: int, corners: Corners) -> None:
        self.boxes.append((row, *corners, self.names.get(label, str(label)), 0, None))

    def settle(self) -> bool:
        """Decide on lines that may be poses; True if they are left out."""
        lengths = {numbers for *_, numbers in self.unclear}
        share = len(self.unclear) / max(len(self.unclear) + self.polygons, 1)
        left_out = len(lengths) == 1 and share >= POSES
        for row, label, corners, numbers in self.unclear:
            if left_out:
                self.dropped_boxes[Reason.UNCLEAR_FORM] += 1
            elif numbers % 2 or max(corners) > 1 + BEYOND:
                self.dropped_boxes[Reason.ODD if numbers % 2 else Reason.NO_SHARE] += 1
            else:
                self._add_box(row, label, corners)
        return left_out

    def is_label(self, lines: Sequence[str]) -> bool:
        """Whether all lines are boxes: a text without an image may be a README or the like."""
        try:
            return all(_parse_line(line, self.form) for line in lines)
        except DroppedError:
            return False


def _read_place(images: Path, labels: Path, start: int, found: _Collected) -> pl.DataFrame:
    """Read the texts of a folder, and return its images; ``start`` is the row of the first."""
    table, dropped = find_images([images])
    found.dropped_images += dropped
    names = (name for name, _ in find_files(labels)[0] if name.lower().endswith(".txt"))
    texts = {name[:-4]: name for name in names if name.rpartition("/")[2] not in NAME_FILES}
    stems = [name.rpartition(".")[0] for name in table["name"].to_list()]
    owners = _owners(texts, stems)
    lost = []
    for stem, name in texts.items():
        rows = owners[stem]
        try:
            content = (labels / name).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read '{labels / name}': {error.strerror}") from error
        # Damaged bytes become signs that no number holds, and are counted so.
        text = content.decode(encoding_of(content[:4]), errors="replace").replace("\r", "\n")
        lines = [line for line in text.split("\n") if line.strip()]
        if len(rows) == 1:
            for line in lines:
                found.add_line(start + rows[0], line)
        elif (rows or found.is_label(lines)) and (lines or labels != images):
            reason = Reason.AMBIGUOUS_NAME if rows else Reason.MISSING
            found.dropped_images[reason] += 1
            found.dropped_boxes[reason] += len(lines)
            lost += [] if rows else [stem]
    if lost:
        found.notes.append(NameMatcher(stems, images).explain(lost, labels))
    return table.with_columns(pl.Series("key", stems, pl.String))


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

    An image whose text is empty or missing has no boxes. The folder holds ``labels/`` (or the texts
    themselves, then beside the images) and, unless ``images`` is given, ``images/``; or splits that do, of
    which ``split`` is read: ``train``, ``validation`` or ``test``.
    """
    need_folder(folder, "the YOLO folder")
    metadata = _find_metadata(folder)
    places, note = _find_places(folder, images, metadata, split)
    found = _Collected(_class_names(folder, places, metadata), metadata.form(), notes=[note] if note else [])
    tables: list[pl.DataFrame] = []
    for place in places:
        tables.append(_read_place(*place, sum(table.height for table in tables), found))
    if found.settle():
        unclear = f"{Reason.UNCLEAR_FORM}: write kpt_shape, or task: segment, into data.yaml"
        found.notes.append(f"'{folder}': {unclear}")
    boxes = box_table(found.boxes)
    if found.dropped_images[Reason.MISSING] and not (
        boxes.height or found.dropped_boxes[Reason.UNCLEAR_FORM]
    ):
        raise UserError(f"no image of the labels is there: {found.notes[-1]}")
    return Annotations(
        pl.concat(tables), boxes, True, +found.dropped_images, +found.dropped_boxes, found.notes
    )
