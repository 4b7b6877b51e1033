"""YOLO: ``images/`` and ``labels/``, a text a picture, a line a box: class, centre, width, height.

Numbers are shares of the picture's width and height. A line with more numbers is a polygon (class, then
x y in turn), whose bounds are the box. Class names stand in ``classes.txt``, ``obj.names`` or ``data.yaml``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pbe.data.sources.files import find_files, find_pictures, need_folder
from pbe.data.sources.records import BAD_NUMBER, MISSING, Annotations, box_table, picture_table
from pbe.errors import UserError

NAME_FILES = ("classes.txt", "obj.names")


def _class_names(folder: Path) -> dict[int, str]:
    for place in (folder, folder / "labels"):
        for name in NAME_FILES:
            if (place / name).is_file():
                lines = (place / name).read_text(encoding="utf-8-sig").splitlines()
                return {number: line.strip() for number, line in enumerate(lines)}
    path = next(iter([*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*.yml"))]), None)
    if path is None:
        return {}
    try:
        names = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8-sig")))["names"]  # type: ignore[index,call-overload]
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return {int(number): str(name) for number, name in pairs}
    except (OmegaConfBaseException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' holds no readable list 'names' of classes") from error


def _parse(line: str) -> tuple[int, float, float, float, float] | None:
    """Return class and x1 y1 x2 y2, or None where the line is no box."""
    words = line.split()
    try:
        label = int(float(words[0]))
        numbers = [float(word) for word in words[1:]]
    except (ValueError, OverflowError):
        return None
    if len(numbers) in (4, 5):  # the fifth is a detector's confidence
        x, y, width, height = numbers[:4]
        return label, x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        return label, min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
    return None


def read_yolo(folder: Path, images: Path | None = None) -> Annotations:
    """Read a YOLO folder; ``images/a/b.jpg`` belongs to ``labels/a/b.txt``.

    A picture whose text is empty or missing has no boxes.

    Args:
        folder: holds ``labels/`` (or the texts themselves, then beside the pictures) and ``images/``.
        images: the folder of pictures, if it is another.

    Raises:
        UserError: a folder is missing.
    """
    need_folder(folder, "the YOLO folder")
    labels = folder / "labels" if (folder / "labels").is_dir() else folder
    pictures, dropped = find_pictures([images or (folder / "images" if labels != folder else folder)])
    names = _class_names(folder)
    table: list[dict[str, Any]] = pictures.to_dicts()
    rows: list[tuple[Any, ...]] = []
    dropped_boxes: Counter[str] = Counter()
    texts = {name for name, _ in find_files(labels)[0] if name.endswith(".txt")} - {*NAME_FILES}
    for row, picture in enumerate(table):
        picture["key"] = picture["name"].rpartition(".")[0]
        text = f"{picture['key']}.txt"
        if text not in texts:
            continue
        texts.discard(text)
        for line in _lines(labels / text):
            box = _parse(line)
            if box is None:
                dropped_boxes[BAD_NUMBER] += 1
            else:
                label, *corners = box
                rows.append((row, *corners, names.get(label, str(label)), 0, None))
    for text in texts:
        dropped[MISSING] += 1
        dropped_boxes[MISSING] += len(_lines(labels / text))
    return Annotations(picture_table(table), box_table(rows), True, dropped, dropped_boxes)


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return [line for line in text.splitlines() if line.strip()]
