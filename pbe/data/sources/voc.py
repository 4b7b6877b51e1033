"""Pascal VOC: one XML a picture, ``Annotations/`` beside ``JPEGImages/``.

VOC counts pixels from 1 and includes the last one, so a box is ``(xmin - 1, ymin - 1, xmax, ymax)`` here;
many tools that write the format count from 0, for which ``one_based`` is switched off.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from pbe.data.sources.files import find_files, find_pictures, need_folder
from pbe.data.sources.records import BAD_NUMBER, FLAG_BITS, MISSING, Annotations, box_table, picture_table
from pbe.errors import UserError

BAD_XML = "unreadable annotation"
FLAGS = {"difficult": "is_difficult", "truncated": "is_truncated", "occluded": "is_occluded"}


def _text(node: ElementTree.Element, name: str) -> str:
    return (node.findtext(name) or "").strip()


def _number(node: ElementTree.Element, name: str) -> float:
    try:
        return float(_text(node, name))
    except ValueError:
        return float("nan")


def _size(root: ElementTree.Element) -> tuple[int | None, int | None]:
    """Return width and height; none where a tool wrote zeros or nothing."""
    sides = [_number(root, f"size/{side}") for side in ("width", "height")]
    return (int(sides[0]), int(sides[1])) if all(side >= 1 for side in sides) else (None, None)


def _boxes(
    root: ElementTree.Element, row: int, one_based: bool, dropped: Counter[str]
) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    shift = 1.0 if one_based else 0.0
    for entry in root.iter("object"):
        x1, y1, x2, y2 = (_number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        if any(value != value for value in (x1, y1, x2, y2)):
            dropped[BAD_NUMBER] += 1
            continue
        flags = sum(FLAG_BITS[flag] for name, flag in FLAGS.items() if _text(entry, name) == "1")
        found.append((row, x1 - shift, y1 - shift, x2, y2, _text(entry, "name"), flags, None))
    return found


def read_voc(folder: Path, images: Path | None = None, one_based: bool = True) -> Annotations:
    """Read a VOC folder.

    Args:
        folder: holds ``Annotations/`` (or is that folder) and, unless ``images`` is given, ``JPEGImages/``.
        images: the folder of pictures.
        one_based: the first pixel is number 1.

    Raises:
        UserError: a folder is missing.
    """
    place = (
        folder / "Annotations" if (folder / "Annotations").is_dir() else need_folder(folder, "the VOC folder")
    )
    pictures, dropped = find_pictures([images or folder / "JPEGImages"])
    by_stem: dict[str, int] = {}
    for row, name in enumerate(pictures["name"].to_list()):
        by_stem.setdefault(name.rpartition(".")[0], row)
    table: list[dict[str, Any]] = pictures.drop("key").to_dicts()
    rows: list[tuple[Any, ...]] = []
    dropped_boxes: Counter[str] = Counter()
    documents = [name for name, _ in find_files(place)[0] if name.lower().endswith(".xml")]
    if not documents:
        raise UserError(f"'{place}' holds no .xml files; is it a folder of Pascal VOC annotations?")
    for name in documents:
        try:
            root = ElementTree.parse(place / name).getroot()
        except (ElementTree.ParseError, OSError, ValueError, LookupError):
            dropped[BAD_XML] += 1
            continue
        picture = by_stem.get(name.rpartition(".")[0])
        if picture is None:
            dropped[MISSING] += 1
            dropped_boxes[MISSING] += sum(1 for _ in root.iter("object"))
            continue
        table[picture]["width"], table[picture]["height"] = _size(root)
        rows += _boxes(root, picture, one_based, dropped_boxes)
    for entry in table:
        entry["key"] = entry["name"].rpartition(".")[0]
    return Annotations(picture_table(table), box_table(rows), False, dropped, dropped_boxes)
