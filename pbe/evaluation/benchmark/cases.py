"""A benchmark folder in COCOEE's layout as cases that are read one by one, when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.benchmark import coco_ee

HALF = 127  # a mask's pixels above this are the hole
# What Pillow raises for files that are no picture, are damaged, or claim to be too large to be opened.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Case:
    """One case of a benchmark.

    Attributes:
        id: twelve digits, the stem of its edit's file.
        image: uint8 RGB ``h w 3``, the source with the true object.
        mask: uint8 ``h w``, 255 = repaint and 0 = keep.
        exemplar: uint8 RGB ``e f 3``.
    """

    id: str
    image: np.ndarray
    mask: np.ndarray
    exemplar: np.ndarray


def case_id(number: int) -> str:
    """Return the id of a benchmark's case as its files are named: at least twelve digits."""
    return f"{number:012d}"


def read_pixels(path: Path, mode: str) -> np.ndarray:
    """Read a picture as uint8, ``h w 3`` for mode ``RGB``, ``h w`` for ``L``.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert(mode))
    except UNREADABLE as error:
        raise UserError(f"'{path}' cannot be read as a picture: {error}") from error


class BenchmarkFolder(Sequence[Case]):
    """The cases of a folder in COCOEE's layout (:mod:`pbe.evaluation.benchmark.coco_ee`), of any image size.

    Args:
        folder: with ``GT_3500``, ``Mask_bbox_3500``, ``Ref_3500`` and ``id_list.npy``.
        first: take so many cases, the first of the list; 0 means all of them.

    Attributes:
        folder: as given.
        ids: of the cases, in the order of the list.
        numbers: of all cases of the folder, also where the first ones are taken.

    Raises:
        UserError: something is missing, or there are no or too few cases; the message lists what.
    """

    def __init__(self, folder: str | Path, first: int = 0) -> None:
        self.folder = Path(folder)
        self._all_files = coco_ee.read_benchmark(self.folder)
        if not 0 <= first <= len(self._all_files):
            raise UserError(f"'{folder}' has {len(self._all_files)} cases; it has no first {first}")
        self._files = self._all_files[: first or None]
        self.numbers = frozenset(files.number for files in self._all_files)
        self.ids = [case_id(files.number) for files in self._files]
        if not self.ids:
            raise UserError(f"'{self.folder}' is a benchmark without cases")

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Case: ...
    @overload
    def __getitem__(self, index: slice) -> list[Case]: ...
    def __getitem__(self, index: int | slice) -> Case | list[Case]:
        """Read a case, or several.

        Raises:
            UserError: a file is damaged, the mask has another size than the picture, or marks nothing.
        """
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        files = self._files[index]
        image, mask = read_pixels(files.image, "RGB"), read_pixels(files.mask, "L")
        if mask.shape != image.shape[:2]:
            raise UserError(f"'{files.mask}' has another size than its picture: {_sizes(mask, image)}")
        hole = np.where(mask > HALF, 255, 0).astype(np.uint8)
        if not hole.any():
            raise UserError(f"'{files.mask}' is black: nothing is to be painted")
        return Case(self.ids[index], image, hole, read_pixels(files.exemplar, "RGB"))

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every picture, from the files' headers.

        Raises:
            UserError: a file has no header of a picture.
        """
        return [_header_size(files.image) for files in self._files]

    @cached_property
    def sha256(self) -> str:
        """Names the cases: the hash of all ids and files' bytes, in the order of the list."""
        return _hash(self._files)

    @cached_property
    def whole_sha256(self) -> str:
        """The same of all cases of the folder, where the first ones are taken."""
        return self.sha256 if len(self._files) == len(self._all_files) else _hash(self._all_files)


def _hash(cases: Sequence[coco_ee.Case]) -> str:
    digest = hashlib.sha256()
    for files in cases:
        for path in (files.image, files.mask, files.exemplar):
            content = path.read_bytes()
            digest.update(f"{case_id(files.number)} {path.parent.name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except UNREADABLE as error:
        raise UserError(f"'{path}' cannot be read as a picture: {error}") from error


def _sizes(mask: np.ndarray, image: np.ndarray) -> str:
    (h, w), (height, width) = mask.shape[:2], image.shape[:2]
    return f"{w} x {h}, the picture {width} x {height}"
