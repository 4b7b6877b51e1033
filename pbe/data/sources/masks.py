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
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from PIL import Image

from pbe.data.samples.masks import decode_rle
from pbe.data.sources import parsing
from pbe.data.sources.annotations import Annotations, DroppedError, Reason, box_table, find_images
from pbe.data.sources.image_files import find_files, is_image, need_folder
from pbe.data.sources.names import NameMatcher
from pbe.errors import UserError
from pbe.mask_reading import BY_LUMINANCE, UnclearMaskError, read_mask_image

FILE_PREFIX = "file:"
SUBPIXEL_BITS, FINE = 4, 3
FAR = 4  # times the image's longest side: no polygon goes so far outside


def load_mask(text: str, width: int, height: int) -> tuple[np.ndarray, str]:
    """Return the mask that a source names, of an image of that size in the frame of the annotation.

    It is uint8 ``h w``, of 0 and 1, and comes with what decided, as :func:`~pbe.mask_reading.read_mask_image`
    says it, where a file can be read in several ways. What is missing, damaged or of another size is dropped.
    """
    if text.startswith(FILE_PREFIX):
        mask, decided = _read_file(text.removeprefix(FILE_PREFIX))
    else:
        mask, decided = _draw(text, width, height), ""
    if mask.shape != (height, width):
        raise DroppedError(Reason.OTHER_MASK_SIZE)
    return mask, decided


def _read_file(path: str) -> tuple[np.ndarray, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large masks and odd tags are no reason to speak
            with Image.open(path) as image:
                pixels, decided = read_mask_image(image)
    except UnclearMaskError as error:
        # Without its numbers, so that the masks of a set are counted together.
        reason = re.split("[:;]", str(error))[0]
        joint = "mask " if reason.startswith("it ") else "mask: "
        raise DroppedError(joint + reason.removeprefix("it ")) from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise DroppedError(Reason.UNREADABLE_MASK) from error
    return pixels // 255, "" if decided == BY_LUMINANCE else decided


def _draw(text: str, width: int, height: int) -> np.ndarray:
    """Draw COCO's ``segmentation``; a run-length code keeps its own size, which must be that of the image."""
    try:
        shape: Any = json.loads(text)
        if isinstance(shape, dict):
            if [parsing.whole(side) for side in shape["size"]] != [height, width]:
                raise DroppedError(Reason.OTHER_MASK_SIZE)
            return decode_rle(shape)
        return _fill(shape, width, height)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, cv2.error) as error:
        raise DroppedError(Reason.UNREADABLE_MASK) from error


def _fill(shape: list[Any], width: int, height: int) -> np.ndarray:
    """Draw COCO's lists of x y in turn, pixel i covering i to i + 1; a single one may lack its brackets.

    Set are the pixels whose centres lie inside. OpenCV also draws the outline, so that the polygons are drawn
    three times as large, where it covers no pixel's centre, and every third point is taken.
    """
    fine = np.zeros((FINE * height, FINE * width), np.uint8)
    for part in shape if all(isinstance(part, list) for part in shape) else [shape]:
        corners = np.array([parsing.number(value) for value in part], np.float64).reshape(-1, 2)
        if not (np.abs(corners) <= FAR * max(width, height)).all():
            raise ValueError("a polygon's number is none or far outside the image")
        fixed = np.round((FINE * corners - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)
        cv2.fillPoly(fine, [fixed], 1, cv2.LINE_8, SUBPIXEL_BITS)
    return np.ascontiguousarray(fine[FINE // 2 :: FINE, FINE // 2 :: FINE])


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return the tight box of what is not zero, x2 and y2 exclusive; DroppedError for an empty mask."""
    x, y, width, height = cv2.boundingRect(mask)
    if not width or not height:
        raise DroppedError(Reason.EMPTY_MASK)
    return float(x), float(y), float(x + width), float(y + height)


def _owner(mask: str, stems: dict[str, int]) -> int | None:
    """Return the image that a mask file belongs to: STEM.png, STEM_anything.png or STEM/anything.png."""
    stem = str(PurePosixPath(mask).with_suffix(""))
    candidates = [stem, str(PurePosixPath(stem).parent)]
    while "_" in PurePosixPath(stem).name:
        stem = stem.rpartition("_")[0]
        candidates.append(stem)
    return next((stems[each] for each in candidates if each in stems), None)


def read_mask_folder(folder: Path, images: Path | None = None) -> Annotations:
    """Read a folder of images and a folder of masks, ``images/`` and ``masks/``.

    ``dog.jpg`` may have one mask, ``dog.png``, or several, one an object: ``dog_1.png`` and ``dog_2.png``, or
    ``dog/1.png`` and ``dog/2.png``. How they are read: :mod:`pbe.mask_reading`. Where ``images`` names the
    folder of images, ``folder`` may be that of masks itself.
    """
    masks = folder / "masks" if (folder / "masks").is_dir() else need_folder(folder, "the folder of masks")
    root = images or need_folder(folder / "images", "the folder of images")
    table, dropped = find_images([root])
    names = table["name"].to_list()
    stems: dict[str, int] = {}
    in_lower_case: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        stem = unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))
        if stem in stems:
            raise UserError(f"two images are called '{stem}', so their masks cannot be told apart")
        stems[stem] = row
        in_lower_case[stem.casefold()].append(row)
    folded = {stem: found[0] for stem, found in in_lower_case.items() if len(found) == 1}
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
    return Annotations(
        table, box_table(rows), False, dropped, +Counter[str]({Reason.UNUSED_MASK: len(unused)}), notes
    )
