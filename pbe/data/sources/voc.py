"""Pascal VOC: one XML a picture, ``Annotations/`` beside ``JPEGImages/``.

VOC counts pixels from 1 and includes the last one, so a box is ``(xmin - 1, ymin - 1, xmax, ymax)`` here;
many tools that write the format count from 0, for which ``one_based`` is switched off.

An XML belongs to the picture of its own name, or, where there is none, to the one of its ``<filename>``.
"""

from __future__ import annotations

import posixpath
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbe.data.sources import scalars
from pbe.data.sources.files import find_files, find_pictures, need_folder
from pbe.data.sources.names import AMBIGUOUS, AMBIGUOUS_NAME, NameMatcher
from pbe.data.sources.records import (
    BAD_FLAG,
    BAD_NUMBER,
    BAD_SIZE,
    FLAG_BITS,
    MISSING,
    OTHER_SIZES,
    Annotations,
    box_table,
    picture_table,
)
from pbe.data.sources.texts import shown
from pbe.errors import UserError

BAD_XML = "unreadable annotation"
CONTRADICTORY = "annotation whose name and <filename> are two pictures"
FLAGS = {"difficult": "is_difficult", "truncated": "is_truncated", "occluded": "is_occluded"}
PICTURE_FOLDERS = ("JPEGImages", "images")


@dataclass
class _Document:
    """What an XML says.

    Attributes:
        stem: its name without ending, within the folder of XMLs.
        filename: the picture that it names, within the same folder; empty if it names none.
        size: width and height; None where a tool wrote zeros or nothing.
        boxes: x1 y1 x2 y2, label and flags, or why a box cannot be used.
        problem: why all of it cannot be used; empty if it can.
    """

    stem: str
    filename: str
    size: tuple[int | None, int | None]
    boxes: list[tuple[Any, ...] | str]
    problem: str = ""


def _document(path: Path, stem: str, shift: float) -> _Document:
    """Read an XML.

    Raises:
        ValueError: it is none.
    """
    root = ElementTree.parse(path).getroot()
    if root.tag != "annotation":
        raise ValueError(f"its root is {shown(root.tag)}, not annotation")
    name = (root.findtext("filename") or "").strip()
    filename = posixpath.join(posixpath.dirname(stem), name) if name else ""
    boxes = [_box(entry, shift) for entry in root.iter("object")]
    try:
        width, height = (scalars.side(root.findtext(f"size/{side}")) for side in ("width", "height"))
    except ValueError:
        return _Document(stem, filename, (None, None), boxes, BAD_SIZE)
    return _Document(stem, filename, (width, height), boxes)


def _box(entry: ElementTree.Element, shift: float) -> tuple[Any, ...] | str:
    sides = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (scalars.number(entry.findtext(f"bndbox/{side}")) for side in sides)
    if any(value != value for value in (x1, y1, x2, y2)):
        return BAD_NUMBER
    try:
        flags = sum(FLAG_BITS[flag] for name, flag in FLAGS.items() if scalars.flag(entry.findtext(name)))
    except ValueError:
        return BAD_FLAG
    return (x1 - shift, y1 - shift, x2, y2, (entry.findtext("name") or "").strip(), flags, None)


@dataclass
class _Found:
    """Rows of the tables, and what was dropped.

    Attributes:
        sizes: width and height by picture, where they are given.
        bad: pictures that are counted as dropped already.
    """

    boxes: list[tuple[Any, ...]] = field(default_factory=list)
    sizes: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    bad: set[int] = field(default_factory=set)
    pictures: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def take(self, document: _Document, owner: int | str) -> None:
        """Take size and boxes of a document for its picture, or count why not."""
        reason = owner if isinstance(owner, str) else document.problem
        if reason:
            self.pictures[reason] += 1
            self.dropped[reason] += len(document.boxes)
            if isinstance(owner, int):
                self.bad.add(owner)
            return
        width, height = document.size
        if width and height:
            self.sizes[int(owner)].add((width, height))
        for box in document.boxes:
            if isinstance(box, str):
                self.dropped[box] += 1
            else:
                self.boxes.append((owner, *box))

    def left_out(self) -> set[int]:
        """Return the pictures whose size is none or contradicts itself, and count their boxes as lost."""
        rows = {row for row, sizes in self.sizes.items() if len(sizes) > 1} - self.bad
        self.pictures[OTHER_SIZES] += len(rows)
        for reason, wrong in ((OTHER_SIZES, rows), (BAD_SIZE, self.bad)):
            self.dropped[reason] += sum(box[0] in wrong for box in self.boxes)
        rows |= self.bad
        self.boxes = [box for box in self.boxes if box[0] not in rows]
        return rows


def _documents(place: Path, found: _Found, one_based: bool) -> list[_Document]:
    """Read every XML; what cannot be read is counted, and the first of it named.

    Raises:
        UserError: there is none.
    """
    names = [name for name, _ in find_files(place)[0] if name.lower().endswith(".xml")]
    if not names:
        raise UserError(f"'{place}' holds no .xml files; is it a folder of Pascal VOC annotations?")
    documents = []
    for name in names:
        try:
            documents.append(_document(place / name, name.rpartition(".")[0], 1.0 if one_based else 0.0))
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            if not found.pictures[BAD_XML]:
                found.notes.append(f"'{place / name}' cannot be read: {' '.join(str(error).split())}")
            found.pictures[BAD_XML] += 1
    return documents


def _owners(documents: Sequence[_Document], names: list[str], root: Path) -> list[int | str]:
    """Return, for each document, the row of its picture or the reason why it has none."""
    by_stem: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        by_stem[name.rpartition(".")[0]].append(row)
    own = [by_stem.get(document.stem, []) for document in documents]
    named = NameMatcher(names, root).match(document.filename for document in documents if document.filename)
    taken = {rows[0] for rows in own if len(rows) == 1}
    owners: list[int | str] = []
    for document, rows in zip(documents, own, strict=True):
        match = named.get(document.filename)
        if len(rows) == 1:
            other = match not in (None, AMBIGUOUS, rows[0]) and match not in taken
            owners.append(CONTRADICTORY if other else rows[0])
        elif match == AMBIGUOUS or (rows and match not in rows):
            owners.append(AMBIGUOUS_NAME)
        else:
            owners.append(MISSING if match is None or (match in taken and not rows) else match)
    return owners


def _picture_folder(folder: Path, place: Path) -> Path:
    """Return ``JPEGImages/`` or ``images/``, or the folder of the XMLs, where pictures lie among them."""
    found = next((folder / name for name in PICTURE_FOLDERS if (folder / name).is_dir()), None)
    return found or (folder / PICTURE_FOLDERS[0] if place != folder else folder)


def read_voc(folder: Path, images: Path | None = None, one_based: bool = True) -> Annotations:
    """Read a VOC folder.

    Args:
        folder: holds ``Annotations/`` (or the XMLs themselves) and, unless ``images`` is given,
            ``JPEGImages/`` (or ``images/``, or the pictures beside the XMLs).
        images: the folder of pictures.
        one_based: the first pixel is number 1.

    Raises:
        UserError: a folder is missing, or no XML has a picture.
    """
    need_folder(folder, "the VOC folder")
    place = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    root = images or _picture_folder(folder, place)
    pictures, dropped = find_pictures([root])
    names = pictures["name"].to_list()
    found = _Found(pictures=dropped)
    documents = _documents(place, found, one_based)
    owners = _owners(documents, names, root)
    for document, owner in zip(documents, owners, strict=True):
        found.take(document, owner)
    lost = [document for document, owner in zip(documents, owners, strict=True) if owner == MISSING]
    present = {"", *names}  # a stale <filename> may name the image of another XML
    missing = [f"{one.stem}.jpg" if one.filename in present else one.filename for one in lost]
    if missing:
        found.notes.append(NameMatcher(names, root).explain(missing, place))
        if not any(isinstance(owner, int) for owner in owners):
            raise UserError(f"no picture of the annotations is there: {found.notes[-1]}")
    bad = found.left_out()
    table: list[dict[str, Any]] = pictures.to_dicts()
    for row, entry in enumerate(table):
        entry["key"] = entry["name"].rpartition(".")[0]
        sizes = found.sizes.get(row, set())
        entry["width"], entry["height"] = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    rows, kept = found.boxes, [row for row in range(len(table)) if row not in bad]
    moved = {row: position for position, row in enumerate(kept)}
    boxes = box_table([(moved[row], *rest) for row, *rest in rows])
    kept_table = picture_table([table[row] for row in kept])
    return Annotations(kept_table, boxes, False, +found.pictures, +found.dropped, found.notes)
