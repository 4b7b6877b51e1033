"""Pascal VOC: one XML an image, ``Annotations/`` beside ``JPEGImages/``.

VOC counts pixels from 1 and includes the last one, so a box is ``(xmin - 1, ymin - 1, xmax, ymax)`` here;
many tools that write the format count from 0, for which ``one_based`` is switched off.

An XML belongs to the image of its own name, or, where there is none, to the one of its ``<filename>``.
"""

from __future__ import annotations

import posixpath
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pbe.data.sources import parsing
from pbe.data.sources.annotations import (
    BAD_FLAG,
    BAD_NUMBER,
    BAD_SIZE,
    FLAG_BITS,
    MISSING,
    OTHER_SIZES,
    Annotations,
    box_table,
    complete,
    find_images,
    take_images,
)
from pbe.data.sources.image_files import find_files, need_folder
from pbe.data.sources.names import AMBIGUOUS, AMBIGUOUS_NAME, NameMatcher
from pbe.errors import UserError

BAD_XML = "unreadable annotation"
CONTRADICTORY = "annotation whose name and <filename> are two images"
FLAGS = {"difficult": "is_difficult", "truncated": "is_truncated", "occluded": "is_occluded"}
IMAGE_FOLDERS = ("JPEGImages", "images")


@dataclass
class _Document:
    """What an XML says."""

    stem: str  # its name without ending, within the folder of XMLs
    filename: str  # the image that it names, within the same folder; empty if it names none
    size: tuple[int | None, int | None]  # width and height; None where a tool wrote zeros or nothing
    boxes: list[tuple[Any, ...] | str]  # x1 y1 x2 y2, label, flags, no mask; or why it cannot be used
    problem: str = ""  # why all of it cannot be used


def _read_document(path: Path, stem: str, shift: float) -> _Document:
    """Read an XML; ValueError where it is none."""
    root = ElementTree.parse(path).getroot()
    if root.tag != "annotation":
        raise ValueError(f"its root is {parsing.shown(root.tag)}, not annotation")
    name = (root.findtext("filename") or "").strip()
    filename = posixpath.join(posixpath.dirname(stem), name) if name else ""
    boxes = [_read_box(entry, shift) for entry in root.iter("object")]
    try:
        width, height = (parsing.side(root.findtext(f"size/{side}")) for side in ("width", "height"))
    except ValueError:
        return _Document(stem, filename, (None, None), boxes, BAD_SIZE)
    return _Document(stem, filename, (width, height), boxes)


def _read_box(entry: ElementTree.Element, shift: float) -> tuple[Any, ...] | str:
    sides = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (parsing.number(entry.findtext(f"bndbox/{side}")) for side in sides)
    if any(value != value for value in (x1, y1, x2, y2)):
        return BAD_NUMBER
    try:
        flags = sum(FLAG_BITS[flag] for name, flag in FLAGS.items() if parsing.flag(entry.findtext(name)))
    except ValueError:
        return BAD_FLAG
    return (x1 - shift, y1 - shift, x2, y2, (entry.findtext("name") or "").strip(), flags, None)


@dataclass
class _Collected:
    """Boxes and sizes by row of the image, and what was dropped; ``bad`` images are counted already."""

    boxes: list[tuple[Any, ...]] = field(default_factory=list)
    sizes: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    bad: set[int] = field(default_factory=set)
    dropped_images: Counter[str] = field(default_factory=Counter)
    dropped_boxes: Counter[str] = field(default_factory=Counter)

    def add(self, document: _Document, owner: int | str) -> None:
        """Take size and boxes of a document for its image, or count why not."""
        reason = owner if isinstance(owner, str) else document.problem
        if reason:
            self.dropped_images[reason] += 1
            self.dropped_boxes[reason] += len(document.boxes)
            if isinstance(owner, int):
                self.bad.add(owner)
            return
        width, height = document.size
        if width and height:
            self.sizes[int(owner)].add((width, height))
        for box in document.boxes:
            if isinstance(box, str):
                self.dropped_boxes[box] += 1
            else:
                self.boxes.append((owner, *box))

    def drop_contradictory(self) -> set[int]:
        """Return the images whose size is none or contradicts itself, and count their boxes as lost."""
        unclear = {row for row, sizes in self.sizes.items() if len(sizes) > 1} - self.bad
        self.dropped_images[OTHER_SIZES] += len(unclear)
        for reason, rows in ((OTHER_SIZES, unclear), (BAD_SIZE, self.bad)):
            self.dropped_boxes[reason] += sum(box[0] in rows for box in self.boxes)
        return unclear | self.bad


def _read_documents(place: Path, found: _Collected, one_based: bool) -> tuple[list[_Document], list[str]]:
    """Read every XML; what cannot be read is counted, and a note names the first of it."""
    names = [name for name, _ in find_files(place)[0] if name.lower().endswith(".xml")]
    if not names:
        raise UserError(f"'{place}' holds no .xml files; is it a folder of Pascal VOC annotations?")
    documents: list[_Document] = []
    notes: list[str] = []
    for name in names:
        try:
            documents.append(_read_document(place / name, name.rpartition(".")[0], float(one_based)))
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            if not notes:
                notes.append(f"'{place / name}' cannot be read: {' '.join(str(error).split())}")
            found.dropped_images[BAD_XML] += 1
    return documents, notes


def _owners(documents: Sequence[_Document], stems: list[str], matcher: NameMatcher) -> list[int | str]:
    """Return, for each document, the row of its image or the reason why it has none."""
    by_stem: dict[str, list[int]] = defaultdict(list)
    for row, stem in enumerate(stems):
        by_stem[stem].append(row)
    own = [by_stem.get(document.stem, []) for document in documents]
    named = matcher.match(document.filename for document in documents if document.filename)
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


def _image_folder(folder: Path, place: Path) -> Path:
    """Return ``JPEGImages/`` or ``images/``, or the folder of the XMLs, where images lie among them."""
    found = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    return found or (folder / IMAGE_FOLDERS[0] if place != folder else folder)


def read_voc(folder: Path, images: Path | None = None, one_based: bool = True) -> Annotations:
    """Read a VOC folder.

    Args:
        folder: holds ``Annotations/`` (or the XMLs themselves) and, unless ``images`` is given,
            ``JPEGImages/`` (or ``images/``, or the images beside the XMLs).
        images: the folder of images.
        one_based: the first pixel is number 1.
    """
    need_folder(folder, "the VOC folder")
    place = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    root = images or _image_folder(folder, place)
    files, dropped = find_images([root])
    names = files["name"].to_list()
    stems = [name.rpartition(".")[0] for name in names]
    matcher = NameMatcher(names, root)
    found = _Collected(dropped_images=dropped)
    documents, notes = _read_documents(place, found, one_based)
    owners = _owners(documents, stems, matcher)
    for document, owner in zip(documents, owners, strict=True):
        found.add(document, owner)
    lost = [document for document, owner in zip(documents, owners, strict=True) if owner == MISSING]
    present = {"", *names}  # a stale <filename> may name the image of another XML
    missing = [f"{one.stem}.jpg" if one.filename in present else one.filename for one in lost]
    if missing:
        notes.append(matcher.explain(missing, place))
        if not any(isinstance(owner, int) for owner in owners):
            raise UserError(f"no image of the annotations is there: {notes[-1]}")
    bad = found.drop_contradictory()
    sizes = {row: next(iter(one)) for row, one in found.sizes.items() if len(one) == 1}
    table = complete(
        files.select("path", "name", "bytes", pl.Series("key", stems, pl.String)),
        width={row: width for row, (width, _) in sizes.items()},
        height={row: height for row, (_, height) in sizes.items()},
    )
    kept = np.array([row for row in range(table.height) if row not in bad], np.int64)
    table, boxes = take_images(table, box_table(found.boxes), kept)
    return Annotations(table, boxes, False, +found.dropped_images, +found.dropped_boxes, notes)
