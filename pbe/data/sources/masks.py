"""Masks of objects: how a source names them, how they become pixels, and the folder of mask files.

A source names a mask in a text, so that millions of them stay in a table: ``file:PATH`` for a mask file, or
COCO's ``segmentation`` as JSON (polygons, or a run-length code). The mask then gives the box.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from pbe.data.rle import decode_rle
from pbe.data.sources.files import find_files, find_pictures, is_picture, need_folder
from pbe.data.sources.records import Annotations, box_table
from pbe.errors import UserError

FILE_PREFIX = "file:"
SUBPIXEL_BITS, FINE = 4, 3
UNUSED_MASK = "mask without a picture"


class BadMaskError(Exception):
    """A mask cannot be used; the text is the reason it is counted under."""


def load_mask(text: str, width: int, height: int) -> np.ndarray:
    """Return the mask that a source names, uint8 ``h w`` of 0 and 1.

    Args:
        text: see the module.
        width: of the picture, pixels, in the frame of the annotation.
        height: of the picture.

    Raises:
        BadMaskError: it is missing, damaged or of another size.
    """
    mask = (
        _read_file(text[len(FILE_PREFIX) :]) if text.startswith(FILE_PREFIX) else _draw(text, width, height)
    )
    if mask.shape != (height, width):
        raise BadMaskError("mask of another size than its picture")
    return mask


def _read_file(path: str) -> np.ndarray:
    try:
        encoded = np.fromfile(path, np.uint8)
        mask = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    except (OSError, cv2.error) as error:
        raise BadMaskError("unreadable mask") from error
    if mask is None:
        raise BadMaskError("unreadable mask")
    brightest = int(mask.max(initial=0))
    if 1 < brightest < 128:  # numbers of classes or instances, which a threshold would mix up
        raise BadMaskError("mask is not black and white")
    return np.asarray(mask > brightest // 2, np.uint8)


def _draw(text: str, width: int, height: int) -> np.ndarray:
    try:
        shape: Any = json.loads(text)
        if isinstance(shape, dict):
            return decode_rle(shape)
        polygons = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in shape]
        return _fill(polygons, width, height)
    except (TypeError, ValueError, OverflowError, cv2.error) as error:
        raise BadMaskError("unreadable mask") from error


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
    """Return the tight box of what is not zero, x2 and y2 exclusive.

    Raises:
        BadMaskError: the mask is empty.
    """
    x, y, width, height = cv2.boundingRect(mask)
    if not width or not height:
        raise BadMaskError("empty mask")
    return float(x), float(y), float(x + width), float(y + height)


def _owner(mask: str, pictures: dict[str, int]) -> int | None:
    """Return the picture that a mask file belongs to: STEM.png, STEM_anything.png or STEM/anything.png."""
    stem = str(PurePosixPath(mask).with_suffix(""))
    if stem in pictures:
        return pictures[stem]
    parent = str(PurePosixPath(stem).parent)
    if parent in pictures:
        return pictures[parent]
    while "_" in PurePosixPath(stem).name:
        stem = stem.rpartition("_")[0]
        if stem in pictures:
            return pictures[stem]
    return None


def read_mask_folder(folder: Path, images: Path | None = None) -> Annotations:
    """Read a folder of pictures and a folder of masks, ``images/`` and ``masks/``.

    A mask is white (or 1) where the object is. ``dog.jpg`` may have one, ``dog.png``, or several, one an
    object: ``dog_1.png`` and ``dog_2.png``, or ``dog/1.png`` and ``dog/2.png``.

    Args:
        folder: holds ``masks/`` and, unless ``images`` is given, ``images/``; or is the folder of masks.
        images: the folder of pictures.

    Raises:
        UserError: a folder is missing or two pictures differ in their ending only.
    """
    masks = folder / "masks" if (folder / "masks").is_dir() else need_folder(folder, "the folder of masks")
    pictures, dropped = find_pictures([images or need_folder(folder / "images", "the folder of pictures")])
    stems: dict[str, int] = {}
    for row, name in enumerate(pictures["name"].to_list()):
        stem = str(PurePosixPath(name).with_suffix(""))
        if stem in stems:
            raise UserError(f"two pictures are called '{stem}', so their masks cannot be told apart")
        stems[stem] = row
    rows: list[tuple[Any, ...]] = []
    dropped_boxes: Counter[str] = Counter()
    for name, _ in find_files(masks)[0]:
        if not is_picture(name):
            continue
        owner = _owner(name, stems)
        if owner is None:
            dropped_boxes[UNUSED_MASK] += 1
            continue
        rows.append((owner, None, None, None, None, "", 0, f"{FILE_PREFIX}{masks / name}"))
    return Annotations(pictures, box_table(rows), False, dropped, dropped_boxes)
