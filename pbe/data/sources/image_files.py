"""Image files: finding them below folders, what their headers say, and boxes and masks turned with them."""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import polars as pl
from PIL import Image, UnidentifiedImageError

from pbe.data.samples.decode import JPEG_END, JPEG_START, UnusablePictureError, decode
from pbe.data.sources.annotations import IMAGE_COLUMNS, complete
from pbe.errors import UserError

# What is no JPEG, PNG or WebP is encoded again when it is packed, or counted as what Pillow cannot read.
IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff",
        ".avif", ".heic", ".heif", ".jp2", ".tga", ".ppm", ".pgm",
    }
)  # fmt: skip
SYSTEM_FILES = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})  # others of macOS begin with a dot
BAD_NAME = "file name is not UTF-8"
TWICE = "image found twice"
AMBIGUOUS_STEM = "different images of one name"

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
STARTS = {JPEG_START: "jpg", PNG_START: "png"}
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
ORIENTATION_TAG = 0x0112
TRANSPOSED = frozenset({5, 6, 7, 8})


def is_image(name: str) -> bool:
    """Whether the name's ending is that of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def need_folder(path: Path, meaning: str) -> Path:
    """Return ``path`` if it is a folder; else a UserError says what it should have been."""
    if not path.is_dir():
        raise UserError(f"{meaning} '{path}' is not a folder")
    return path


def need_file(path: Path, meaning: str) -> Path:
    """Return ``path`` if it is a file; else a UserError says what it should have been."""
    if not path.is_file():
        raise UserError(f"{meaning} '{path}' is not a file")
    return path


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield (name within the root, bytes) of every file below ``folder`` that is not hidden."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in SYSTEM_FILES:
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size


def find_files(folder: Path) -> tuple[list[tuple[str, int]], int]:
    """Return (name within ``folder``, bytes) of all files, sorted, and how many names are not UTF-8."""
    try:
        found = sorted(_walk(str(folder), ""))
    except OSError as error:
        raise UserError(f"cannot read '{error.filename or folder}': {error.strerror}") from error
    good = [(name, size) for name, size in found if name.isprintable() or _is_utf8(name)]
    return good, len(found) - len(good)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_images(
    folders: Sequence[Path], *, stems: bool = False, root: Path | None = None
) -> tuple[pl.DataFrame, Counter[str]]:
    """Return the table of all images below some folders, sorted by name, and what was dropped.

    Args:
        folders: walked in this order.
        stems: the key is the file's name without folders and ending; of files with the same key and number of
            bytes the first is taken, of others none. Else it is the name within the root, ending included.
        root: names are within this folder; with none, within each of ``folders``.
    """
    schema = {name: IMAGE_COLUMNS[name] for name in ("name", "bytes")}
    tables = [pl.DataFrame(schema={"path": pl.String, **schema})]
    dropped: Counter[str] = Counter()
    for folder in folders:
        files, bad = find_files(need_folder(folder, "the folder of images"))
        dropped[BAD_NAME] += bad
        start = f"{folder.relative_to(root).as_posix()}/" if root is not None and folder != root else ""
        table = pl.DataFrame([file for file in files if is_image(file[0])], schema=schema, orient="row")
        within, name = pl.lit(f"{folder}/") + pl.col("name"), pl.lit(start) + pl.col("name")
        tables.append(table.select(within.alias("path"), name.alias("name"), "bytes"))
    table = pl.concat(tables)
    stem = pl.col("name").str.replace(r"^.*/", "").str.replace(r"\.[^.]*$", "")
    table = table.with_columns((stem if stems else pl.col("name")).alias("key"))
    copies = table.select(pl.col("bytes").n_unique().over("key") == 1).to_series()
    unique = table.filter(copies).unique("key", keep="first", maintain_order=True)
    alike = int(copies.sum())
    dropped[TWICE] += alike - unique.height
    dropped[AMBIGUOUS_STEM] += table.height - alike
    return complete(unique), +dropped


class UnreadableImageError(Exception):
    """An image cannot be read; the text says why."""


@dataclass(frozen=True)
class ImageHeader:
    """What stands at the start of an image file.

    Attributes:
        extension: ``jpg``, ``png`` or ``webp``, or empty for a format that shards do not hold.
        stored_size: width and height in pixels, before the EXIF orientation.
        orientation: EXIF's, 1 to 8.
        frames: more than one in an animation.
    """

    extension: str
    stored_size: tuple[int, int]
    orientation: int
    frames: int

    @property
    def displayed_size(self) -> tuple[int, int]:
        """Width and height as shown, after the EXIF orientation."""
        width, height = self.stored_size
        return (height, width) if self.orientation in TRANSPOSED else (width, height)


def _check_whole(encoded: bytes) -> None:
    """Complain about a file that was cut short; decoders fill the rest with grey and say nothing."""
    if not encoded:
        raise UnreadableImageError("empty file")
    whole = True
    if encoded[:2] == JPEG_START:
        whole = JPEG_END in encoded[len(encoded) // 2 :]
    elif encoded[:8] == PNG_START:
        whole = PNG_END in encoded
    elif encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        whole = len(encoded) >= 8 + int.from_bytes(encoded[4:8], "little")
    if not whole:
        raise UnreadableImageError("cut short")


def inspect_image(encoded: bytes) -> ImageHeader:
    """Read an image's header.

    Raises:
        UnreadableImageError: it is no image, or was cut short.
    """
    _check_whole(encoded)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks and large images are no reason to speak
            with Image.open(io.BytesIO(encoded)) as image:
                orientation, frames, size = _orientation(image), _frames(image), image.size
                extension = EXTENSIONS.get(image.format or "", "")
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        return _by_pixels(encoded, error)
    # OpenCV, with which images are decoded later, turns JPEG, PNG and WebP alike, but no other format.
    return ImageHeader(extension, size, orientation if extension else 1, frames)


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation; a block that cannot be read turns nothing, and harms no pixel."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # its parser raises whatever it stumbles over
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _frames(image: Image.Image) -> int:
    if image.format in ("JPEG", "MPO"):
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # damage behind the first frame
        return 1


def _by_pixels(encoded: bytes, error: Exception) -> ImageHeader:
    """Return the header of an image that Pillow cannot open, and OpenCV decodes all the same."""
    reason = "damaged header"
    if isinstance(error, UnidentifiedImageError):
        reason = "no image"
    if isinstance(error, Image.DecompressionBombError):
        raise UnreadableImageError("too many pixels") from error
    extension = next((name for mark, name in STARTS.items() if encoded.startswith(mark)), "")
    if not extension:
        raise UnreadableImageError(reason) from error
    try:
        height, width = decode(encoded, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION).shape[:2]
    except UnusablePictureError as damage:
        raise UnreadableImageError(reason) from damage
    return ImageHeader(extension, (width, height), 1, 1)


def turn_boxes(boxes: np.ndarray, width: int, height: int, orientation: int) -> np.ndarray:
    """Turn boxes from the stored frame into the displayed one.

    Args:
        boxes: ``n 4``, x1 y1 x2 y2 in pixels of the stored frame.
        width: of the stored image.
        height: of the stored image.
        orientation: EXIF's, 1 to 8.

    Returns:
        ``n 4``, in pixels of the displayed frame.
    """
    x1, y1, x2, y2 = boxes.T
    if orientation in (2, 3, 7, 8):  # mirrored from left to right, before a transposition
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    turned = (y1, x1, y2, x2) if orientation in TRANSPOSED else (x1, y1, x2, y2)
    return np.stack(turned, axis=1)


def turn_image(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image or mask, ``h w`` or ``h w c``, from the stored frame into the displayed one."""
    if orientation in (2, 3, 7, 8):
        image = image[:, ::-1]
    if orientation in (3, 4, 6, 7):
        image = image[::-1]
    if orientation in TRANSPOSED:
        image = image.swapaxes(0, 1)
    return np.ascontiguousarray(image)
