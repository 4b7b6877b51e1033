"""Where a YOLO set keeps images, labels and class names, and what its ``data.yaml`` says of the labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbe.data.sources.parsing import read_text, read_yaml, shown, whole
from pbe.errors import UserError

NAME_FILES = ("classes.txt", "obj.names")
YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
NOTHING = ("", "~", "null")  # YAML's ways to write that there is no value
TASKS = ("detect", "segment", "pose", "obb")


@dataclass(frozen=True)
class Place:
    """A folder of images and the folder of their texts, which may be the same."""

    images: Path
    labels: Path


@dataclass(frozen=True)
class Form:
    """What the metadata say of a line of a label; empty and 0 where they say nothing."""

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
        for number, name in pairs:
            if whole(number) is None or not isinstance(name, str):
                raise UserError(
                    f"'{self.path}': 'names' holds {shown(f'{number}: {name}')}, which is no number and name"
                )
        return {int(whole(number) or 0): name for number, name in pairs}

    def split(self, split: str) -> list[str]:
        """Return the folders of images that it names for a split; none where it names none."""
        key = next((key for key in SPLITS.get(split, ()) if self.values.get(key)), None)
        paths = _as_list(self.values[key]) if key else []
        if not all(isinstance(path, str) for path in paths):
            raise UserError(f"'{self.path}': {key} is no path and no list of paths")
        if any(path.lower().endswith(".txt") for path in paths):
            raise UserError(
                f"'{self.path}': {key} is a list of images, {shown(paths[0])};"
                " name their folder instead: yolo:FOLDER@IMAGES"
            )
        return paths


def find_metadata(folder: Path) -> Metadata:
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
        for path in (above / name for name in YAML_NAMES):
            values = read_yaml(path) if path.is_file() else {}
            if _names_folder(values, folder.resolve().relative_to(above)):
                return Metadata(path, values)
    return Metadata()


def _names_folder(values: dict[str, Any], folder: Path) -> bool:
    """Whether a split of a ``data.yaml`` lies in a folder, whose path is within that of the file."""
    paths = [path for keys in SPLITS.values() for key in keys for path in _as_list(values.get(key))]
    own = set(folder.parts) - {"images", "labels"}
    return any(own <= set(re.split(r"[/\\]", path)) for path in paths if isinstance(path, str))


def class_names(folder: Path, places: Sequence[Place], metadata: Metadata) -> dict[int, str]:
    """Return names by class number, of ``classes.txt``, ``obj.names`` or ``data.yaml``; empty without one."""
    folders = dict.fromkeys((folder, folder / "labels", *(place.labels for place in places)))
    paths = [place / name for place in folders for name in NAME_FILES if (place / name).is_file()]
    found = {path: dict(enumerate(line.strip() for line in read_text(path).split("\n"))) for path in paths}
    if metadata.path and (not found or "names" in metadata.values):
        found[metadata.path] = metadata.class_names()
    names: dict[int, tuple[str, Path]] = {}
    for path, numbered in found.items():
        for number, name in numbered.items():
            known, source = names.setdefault(number, (name, path)) if name else ("", path)
            if known != name:
                raise UserError(
                    f"class {number} is {shown(known)} in '{source}' and {shown(name)} in '{path}';"
                    " make them agree, or leave one of the files there"
                )
    return {number: name for number, (name, _) in names.items()}


def find_places(folder: Path, images: Path | None, metadata: Metadata, split: str) -> tuple[list[Place], str]:
    """Return the folders of images and labels, and a note on the split where one was chosen.

    Of splits one is read: of those that ``data.yaml`` names (``images/train``, or ``train/images``), or of
    folders that hold ``images/`` and ``labels/``. Without any, ``images/`` and ``labels/`` are read whole.
    """
    labels = folder / "labels"
    if images is not None:
        return [Place(images, labels if labels.is_dir() else folder)], ""
    if metadata.path is not None and metadata.path.parent != folder:
        metadata = Metadata()
    if labels.is_dir():
        return _inner_places(folder, metadata, split)
    named, splits = metadata.split(split), _split_folders(folder)
    found = [_resolve(folder, metadata, path) for path in named]
    lost = next((path for path, place in zip(named, found, strict=True) if place is None), None)
    if named and lost is None:
        places = [Place(path, _labels_of(path)) for path in found if path is not None]
        return places, f"'{folder}': the split {split} of {metadata.path}, {shown(', '.join(named))}"
    if named and (splits or not any(folder.rglob("*.txt"))):
        raise UserError(
            f"'{metadata.path}' names {shown(lost)} for {split}, which is not there;"
            f" name a folder with images/ and labels/: yolo:{folder}/{next(iter(splits), 'train')}"
        )
    wanted = next((folder / name for name in SPLITS.get(split, ()) if name in splits), None)
    if wanted:
        return [Place(wanted / "images", wanted / "labels")], f"'{folder}': the split {wanted.name}"
    if splits:
        raise UserError(f"'{folder}' holds {', '.join(splits)}; name one: yolo:{folder / splits[0]}")
    return [Place(folder, folder)], ""


def _inner_places(folder: Path, metadata: Metadata, split: str) -> tuple[list[Place], str]:
    """Return the folders of a split within ``images/`` and ``labels/``, or the two themselves."""
    values = [metadata.values.get(key) for key in SPLITS.get(split, ())]
    named = [path for value in values for path in _as_list(value) if path]
    images = (folder / "images").resolve()
    found = [_resolve(folder, metadata, path) for path in named if isinstance(path, str)]
    ends = [path.resolve().relative_to(images) for path in found if path and images in path.resolve().parents]
    if ends and len(ends) == len(named):
        places = [Place(folder / "images" / end, folder / "labels" / end) for end in ends]
        return places, f"'{folder}': the split {split} of {metadata.path}, {shown(', '.join(named))}"
    lists = any(isinstance(path, str) and path.lower().endswith(".txt") for path in named)
    note = f"'{folder}': all of images/ is read, not a split {split}" if lists or split != "train" else ""
    return [Place(folder / "images", folder / "labels")], note


def _labels_of(images: Path) -> Path:
    """Return where the labels of a folder of images lie: in ``labels`` instead of ``images``, or there."""
    parts = list(images.parts)
    if "images" not in parts:
        return images / "labels" if (images / "labels").is_dir() else images
    last = len(parts) - 1 - parts[::-1].index("images")
    labels = Path(*parts[:last], "labels", *parts[last + 1 :])
    return labels if labels.is_dir() else images


def _resolve(folder: Path, metadata: Metadata, path: str) -> Path | None:
    """Return the folder that ``data.yaml`` means: as it stands, or, written elsewhere, by its last parts."""
    root = str(metadata.values.get("path") or "").replace("\\", "/")
    path = path.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    ends = [folder.joinpath(*parts[start:]) for start in range(len(parts))]
    for candidate in (folder / root / path, folder / path, *ends):
        if candidate.is_dir():
            inner = candidate / "images"
            return inner if inner.is_dir() and (candidate / "labels").is_dir() else candidate
    return None


def _split_folders(folder: Path) -> list[str]:
    """Return the folders below that hold ``images/`` and ``labels/``."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path.name for path in inner if (path / "images").is_dir() and (path / "labels").is_dir()]
