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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pbe.data.sources import parsing
from pbe.data.sources.annotations import (
    FLAG_BITS,
    Annotations,
    DroppedError,
    Reason,
    box_table,
    drop_images,
    find_images,
    with_known,
)
from pbe.data.sources.image_files import find_files, need_folder
from pbe.data.sources.names import AMBIGUOUS, NameMatcher
from pbe.errors import UserError

FLAGS = {"difficult": "is_difficult", "truncated": "is_truncated", "occluded": "is_occluded"}
IMAGE_FOLDERS = ("JPEGImages", "images")


@dataclass
class _Document:
    """What an XML says."""

    stem: str  # its name without ending, within the folder of XMLs
    filename: str  # the image that it names, within the same folder; empty if it names none
    size: tuple[int | None, int | None] | None  # width and height; None for numbers that no image has
    boxes: list[tuple[Any, ...]]  # x1 y1 x2 y2, label, flags, no mask
    bad_boxes: Counter[str]  # that cannot be used, by reason


def _read_document(path: Path, stem: str, shift: float) -> _Document:
    """Read an XML; ValueError where it is none."""
    root = ElementTree.parse(path).getroot()
    if root.tag != "annotation":
        raise ValueError(f"its root is {parsing.shown(root.tag)}, not annotation")
    name = (root.findtext("filename") or "").strip()
    document = _Document(
        stem, posixpath.join(posixpath.dirname(stem), name) if name else "", None, [], Counter()
    )
    for entry in root.iter("object"):
        try:
            document.boxes.append(_read_box(entry, shift))
        except DroppedError as error:
            document.bad_boxes[str(error)] += 1
    try:
        width, height = (parsing.side(root.findtext(f"size/{side}")) for side in ("width", "height"))
        document.size = (width, height)
    except DroppedError:
        pass  # it stays None, for which the image is dropped
    return document


def _read_box(entry: ElementTree.Element, shift: float) -> tuple[Any, ...]:
    sides = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (parsing.number(entry.findtext(f"bndbox/{side}")) for side in sides)
    if any(value != value for value in (x1, y1, x2, y2)):
        raise DroppedError(Reason.BAD_NUMBER)
    flags = sum(FLAG_BITS[flag] for name, flag in FLAGS.items() if parsing.flag(entry.findtext(name)))
    return (x1 - shift, y1 - shift, x2, y2, (entry.findtext("name") or "").strip(), flags, None)


def _read_documents(place: Path, shift: float, notes: list[str]) -> tuple[list[_Document], int]:
    """Read every XML; returns how many cannot be read, of which a note names the first."""
    names = [name for name, _ in find_files(place)[0] if name.lower().endswith(".xml")]
    if not names:
        raise UserError(f"'{place}' holds no .xml files; is it a folder of Pascal VOC annotations?")
    documents: list[_Document] = []
    for name in names:
        try:
            documents.append(_read_document(place / name, name.rpartition(".")[0], shift))
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            if not notes:
                notes.append(f"'{place / name}' cannot be read: {' '.join(str(error).split())}")
    return documents, len(names) - len(documents)


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
            owners.append(Reason.CONTRADICTORY if other else rows[0])
        elif match == AMBIGUOUS or (rows and match not in rows):
            owners.append(Reason.AMBIGUOUS_NAME)
        else:
            owners.append(Reason.MISSING if match is None or (match in taken and not rows) else match)
    return owners


def _settle(
    documents: Sequence[_Document],
    owners: Sequence[int | str],
    lost_images: Counter[str],
    lost_boxes: Counter[str],
) -> tuple[list[tuple[Any, ...]], dict[int, tuple[int, int]], set[int]]:
    """Return boxes, sizes by row, and the rows of images whose sizes are none or contradict each other."""
    by_row: dict[int, list[_Document]] = defaultdict(list)
    for document, owner in zip(documents, owners, strict=True):
        reason = owner if isinstance(owner, str) else "" if document.size else Reason.BAD_SIZE
        if isinstance(owner, int):
            by_row[owner].append(document)
        if reason:
            lost_images[reason] += 1
            lost_boxes[reason] += len(document.boxes) + document.bad_boxes.total()
            document.boxes.clear()
        else:
            lost_boxes.update(document.bad_boxes)
    boxes: list[tuple[Any, ...]] = []
    sizes: dict[int, tuple[int, int]] = {}
    unclear: set[int] = set()
    for row, own in by_row.items():
        known = {
            (width, height) for width, height in filter(None, (one.size for one in own)) if width and height
        }
        bad = any(one.size is None for one in own)
        if bad or len(known) > 1:
            unclear.add(row)
            lost_images[Reason.OTHER_SIZES] += not bad
            lost_boxes[Reason.BAD_SIZE if bad else Reason.OTHER_SIZES] += sum(len(one.boxes) for one in own)
            continue
        if known:
            sizes[row] = known.pop()
        boxes += [(row, *box) for one in own for box in one.boxes]
    return boxes, sizes, unclear


def read_voc(folder: Path, images: Path | None = None, one_based: bool = True) -> Annotations:
    """Read a VOC folder.

    It holds ``Annotations/`` (or the XMLs themselves) and, unless ``images`` is given, ``JPEGImages/`` (or
    ``images/``, or the images beside the XMLs).
    """
    need_folder(folder, "the VOC folder")
    place = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    beside = folder if place == folder else folder / IMAGE_FOLDERS[0]
    inside = (folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir())
    root = images or next(inside, beside)
    files, dropped = find_images([root])
    names = files["name"].to_list()
    stems = [name.rpartition(".")[0] for name in names]
    matcher, notes = NameMatcher(names, root), list[str]()
    documents, dropped[Reason.BAD_XML] = _read_documents(place, float(one_based), notes)
    owners = _owners(documents, stems, matcher)
    lost = [document for document, owner in zip(documents, owners, strict=True) if owner == Reason.MISSING]
    present = {"", *names}  # a stale <filename> may name the image of another XML
    missing = [f"{one.stem}.jpg" if one.filename in present else one.filename for one in lost]
    if missing:
        notes.append(matcher.explain(missing, place))
        if not any(isinstance(owner, int) for owner in owners):
            raise UserError(f"no image of the annotations is there: {notes[-1]}")
    dropped_boxes: Counter[str] = Counter()
    boxes, sizes, unclear = _settle(documents, owners, dropped, dropped_boxes)
    table = with_known(files.with_columns(pl.Series("key", stems, pl.String)), sizes, {})
    table, found = drop_images(table, box_table(boxes), unclear)
    return Annotations(table, found, False, +dropped, +dropped_boxes, notes)
