"""Masks of objects: how a source names them, how they become pixels, and the folder of mask files.

A source names a mask in a text, so that millions of them stay in a table: ``file:PATH`` for a mask file (see
:mod:`pbe.mask_reading`), or COCO's ``segmentation`` as JSON (polygons, or a run-length code). The mask then
gives the box.
"""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from PIL import Image

from pbe.data.samples.masks import decode_rle
from pbe.data.sources import parsing
from pbe.data.sources.annotations import Annotations, box_table, find_images
from pbe.data.sources.image_files import find_files, is_image, need_folder
from pbe.data.sources.names import NameMatcher
from pbe.errors import UserError
from pbe.mask_reading import BY_LUMINANCE, UnclearMaskError, read_mask_image

FILE_PREFIX = "file:"
SUBPIXEL_BITS, FINE = 4, 3
FAR = 4  # times the image's longest side: no polygon goes so far outside
UNUSED_MASK = "mask without an image"
UNREADABLE_MASK = "unreadable mask"
OTHER_SIZE = "mask of another size than its image"


class BadMaskError(Exception):
    """A mask cannot be used; the text is the reason it is counted under."""


@dataclass(frozen=True)
class LoadedMask:
    """A mask and what decided, where its file could be read in several ways."""

    pixels: np.ndarray  # uint8 h w, of 0 and 1
    read_by: str = ""  # of read_mask_image; empty where luminance did, or for no file


def load_mask(text: str, width: int, height: int) -> LoadedMask:
    """Return the mask that a source names, of an image of that size in the frame of the annotation.

    Raises:
        BadMaskError: it is missing, damaged or of another size.
    """
    if text.startswith(FILE_PREFIX):
        mask = _read_file(text.removeprefix(FILE_PREFIX))
    else:
        mask = LoadedMask(_draw(text, width, height))
    if mask.pixels.shape != (height, width):
        raise BadMaskError(OTHER_SIZE)
    return mask


def _read_file(path: str) -> LoadedMask:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large masks and odd tags are no reason to speak
            with Image.open(path) as image:
                pixels, decided = read_mask_image(image)
    except UnclearMaskError as error:
        # Without its numbers, so that the masks of a set are counted together.
        reason = re.split("[:;]", str(error))[0]
        joint = "mask " if reason.startswith("it ") else "mask: "
        raise BadMaskError(joint + reason.removeprefix("it ")) from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise BadMaskError(UNREADABLE_MASK) from error
    return LoadedMask(pixels // 255, "" if decided == BY_LUMINANCE else decided)


def _draw(text: str, width: int, height: int) -> np.ndarray:
    try:
        shape: Any = json.loads(text)
        if isinstance(shape, dict):
            if [parsing.whole(side) for side in shape["size"]] != [height, width]:
                raise BadMaskError(OTHER_SIZE)
            return decode_rle(shape)
        return _fill(_polygons(shape, max(width, height)), width, height)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, cv2.error) as error:
        raise BadMaskError(UNREADABLE_MASK) from error


def _polygons(shape: list[Any], longest: int) -> list[np.ndarray]:
    """Return polygons, each ``n 2``, of COCO's lists of x y in turn; a single one may lack its brackets."""
    lists = shape if all(isinstance(part, list) for part in shape) else [shape]
    polygons = []
    for part in lists:
        points = np.array([parsing.number(value) for value in part], np.float64).reshape(-1, 2)
        if not (np.abs(points) <= FAR * longest).all():
            raise ValueError("a polygon's number is none or far outside the image")
        polygons.append(points)
    return polygons


def _fill(polygons: list[np.ndarray], width: int, height: int) -> np.ndarray:
    """Set the pixels whose centres lie inside; ``n 2`` corners, pixel i covering i to i + 1.

    OpenCV also draws the outline, so that the polygons are drawn three times as large, where it covers no
    pixel's centre, and every third point is taken.
    """
    fine = np.zeros((FINE * height, FINE * width), np.uint8)
    for corners in polygons:
        fixed = np.round((FINE * corners - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)
        cv2.fillPoly(fine, [fixed], 1, cv2.LINE_8, SUBPIXEL_BITS)
    return np.ascontiguousarray(fine[FINE // 2 :: FINE, FINE // 2 :: FINE])


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return the tight box of what is not zero, x2 and y2 exclusive; BadMaskError for an empty mask."""
    x, y, width, height = cv2.boundingRect(mask)
    if not width or not height:
        raise BadMaskError("empty mask")
    return float(x), float(y), float(x + width), float(y + height)


def _owner(mask: str, stems: dict[str, int]) -> int | None:
    """Return the image that a mask file belongs to: STEM.png, STEM_anything.png or STEM/anything.png."""
    stem = str(PurePosixPath(mask).with_suffix(""))
    candidates = [stem, str(PurePosixPath(stem).parent)]
    while "_" in PurePosixPath(stem).name:
        stem = stem.rpartition("_")[0]
        candidates.append(stem)
    return next((stems[each] for each in candidates if each in stems), None)


def _stems(names: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the rows of images by name without ending, and by that in lower case where it is unambiguous."""
    stems: dict[str, int] = {}
    folded: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        stem = unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))
        if stem in stems:
            raise UserError(f"two images are called '{stem}', so their masks cannot be told apart")
        stems[stem] = row
        folded[stem.casefold()].append(row)
    return stems, {stem: rows[0] for stem, rows in folded.items() if len(rows) == 1}


def read_mask_folder(folder: Path, images: Path | None = None) -> Annotations:
    """Read a folder of images and a folder of masks, ``images/`` and ``masks/``.

    ``dog.jpg`` may have one mask, ``dog.png``, or several, one an object: ``dog_1.png`` and ``dog_2.png``, or
    ``dog/1.png`` and ``dog/2.png``. How they are read: :mod:`pbe.mask_reading`.

    Args:
        folder: holds ``masks/`` and, unless ``images`` is given, ``images/``; or is the folder of masks.
        images: the folder of images.
    """
    masks = folder / "masks" if (folder / "masks").is_dir() else need_folder(folder, "the folder of masks")
    root = images or need_folder(folder / "images", "the folder of images")
    table, dropped = find_images([root])
    names = table["name"].to_list()
    stems, folded = _stems(names)
    rows: list[tuple[Any, ...]] = []
    unused: list[str] = []
    for name in filter(is_image, (name for name, _ in find_files(masks)[0])):
        plain = unicodedata.normalize("NFC", name)
        owner = _owner(plain, stems)
        owner = _owner(plain.casefold(), folded) if owner is None else owner
        if owner is None:
            unused.append(name)
        else:
            rows.append((owner, None, None, None, None, "", 0, f"{FILE_PREFIX}{masks / name}"))
    notes = []
    if unused:
        nearest = NameMatcher(names, root).nearest(unused[0])
        hint = f", and '{nearest}' is the nearest" if nearest else ""
        notes.append(
            f"'{masks / unused[0]}' ({len(unused)} in all) belongs to no image in '{root}'{hint};"
            " the masks of dog.jpg are called dog.png, dog_1.png or dog/1.png"
        )
        if not rows:
            raise UserError(f"no mask has an image: {notes[0]}")
    return Annotations(table, box_table(rows), False, dropped, +Counter({UNUSED_MASK: len(unused)}), notes)
