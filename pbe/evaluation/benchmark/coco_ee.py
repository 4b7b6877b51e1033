"""COCOEE, the paper's benchmark: the layout of its folder, a check of it, and its cases, read one by one.

A case is three PNGs that share an id of twelve digits, listed in ``id_list.npy`` (int64)::

    test_bench/GT_3500/000000000139_GT.png            source, 512 x 512
    test_bench/Mask_bbox_3500/000000000139_mask.png   white (255) is repainted, a filled box
    test_bench/Ref_3500/000000000139_ref.png          exemplar, any size
    test_bench/id_list.npy

The ids are file names and nothing else: many of the released ones are no ids of COCO.
"""

from __future__ import annotations

import hashlib
import shutil
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar, overload
from zipfile import BadZipFile

import cv2
import numpy as np
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.sets import UNREADABLE, read_image
from pbe.files import atomic_write, make_folder

PARTS = (("GT_3500", "GT"), ("Mask_bbox_3500", "mask"), ("Ref_3500", "ref"))  # folders, ends of names
ID_LIST = "id_list.npy"
SIZE = 512
MIN_SIZE = 16
PROBLEMS_SHOWN = 20
T = TypeVar("T")


def case_id(number: int) -> str:
    """Return the id of a benchmark's case as its files are named: at least twelve digits."""
    return f"{number:012d}"


def case_paths(folder: Path, number: int) -> list[Path]:
    """Return the paths of a case's image, mask and exemplar."""
    return [folder / part / f"{case_id(number)}_{end}.png" for part, end in PARTS]


@contextmanager
def new_benchmark(folder: Path) -> Iterator[Path]:
    """Give a folder to write cases to, which takes its place only when all went well.

    Until then the cases lie in a hidden folder beside it, which goes away with whatever goes wrong; what a
    killed run left there is replaced. The folder itself may be there if it is empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' is not empty; name a new folder")
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, _ in PARTS:
            make_folder(partial / name)
        yield partial
        partial.replace(folder)
    except OSError as error:
        raise UserError(f"the benchmark '{folder}' cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_case(folder: Path, number: int, image: np.ndarray, mask: np.ndarray, exemplar: np.ndarray) -> None:
    """Write the three files of a case; images are uint8 RGB ``h w 3``, masks ``h w``."""
    for path, pixels in zip(case_paths(folder, number), (image, mask, exemplar), strict=True):
        stored = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        atomic_write(path, cv2.imencode(".png", stored)[1].tobytes(), sync=True)


def write_ids(folder: Path, numbers: Iterable[int]) -> None:
    """Write the list of the cases, which comes last: a folder without it is not whole."""
    with (folder / ID_LIST).open("wb") as file:
        np.save(file, np.array(list(numbers), np.int64), allow_pickle=False)


def _read_ids(folder: Path, problems: list[str]) -> list[int]:
    try:
        listed = np.load(folder / ID_LIST, allow_pickle=False)
        if not isinstance(listed, np.ndarray):
            raise ValueError("it is an archive of several")
        ids = [int(number) for number in listed.ravel()]
    except FileNotFoundError:
        problems.append(f"{ID_LIST} is missing")
        return []
    except (OSError, ValueError, EOFError, OverflowError, BadZipFile) as error:
        problems.append(f"{ID_LIST} is no list of numbers ({error})")
        return []
    if not ids:
        problems.append(f"{ID_LIST} is empty: a benchmark without cases")
    problems += [f"{ID_LIST} names {number} {n} times" for number, n in Counter(ids).items() if n > 1]
    return list(dict.fromkeys(ids))


def _check_case(paths: Sequence[Path], size: int) -> Iterator[str]:
    """Yield what is wrong with the files of a case, which are there."""
    modes = (cv2.IMREAD_COLOR, cv2.IMREAD_GRAYSCALE, cv2.IMREAD_COLOR)
    image, mask, exemplar = (cv2.imread(str(path), mode) for path, mode in zip(paths, modes, strict=True))
    for path, pixels in zip(paths, (image, mask, exemplar), strict=True):
        if pixels is None:
            yield f"{path.parent.name}/{path.name} cannot be read"
    # Without a size asked for, the mask has to fit its image.
    wanted = (size, size) if size else None if image is None else image.shape[:2]
    for path, pixels in zip(paths[:2], (image, mask), strict=True):
        if wanted and pixels is not None and pixels.shape[:2] != wanted:
            height, width = pixels.shape[:2]
            yield f"{path.name} is {width} x {height}, not {wanted[1]} x {wanted[0]}"
    if mask is None:
        return
    if not set(np.unique(mask).tolist()) <= {0, 255}:
        yield f"{paths[1].name} holds other values than 0 and 255"
    elif not mask.any() or mask.all():
        yield f"{paths[1].name} is all {'white' if mask.any() else 'black'}"


def find_problems(folder: Path, *, pixels: bool = True, size: int = SIZE) -> list[str]:
    """Return everything that is wrong with a benchmark folder, a line each; empty if nothing is.

    Args:
        folder: the ``test_bench`` folder.
        pixels: open every image too.
        size: sides that images and masks must have; 0 means that a mask must fit its image.
    """
    problems = [f"the folder {name} is missing" for name, _ in PARTS if not (folder / name).is_dir()]
    ids = _read_ids(folder, problems)
    for number in ids:
        paths = case_paths(folder, number)
        gone = [path for path in paths if path.parent.is_dir() and not path.is_file()]
        problems += [f"{path.parent.name}/{path.name} is missing" for path in gone]
        if pixels and all(path.is_file() for path in paths):
            problems += _check_case(paths, size)
    wanted = {path for number in ids for path in case_paths(folder, number)}
    for part, _ in PARTS if ids else ():
        if extra := sorted(set((folder / part).glob("*.png")) - wanted):
            named = f"{extra[0].name} ..."
            problems.append(f"{part} holds {len(extra)} files that {ID_LIST} does not name: {named}")
    return problems


def read_benchmark(folder: str | Path, *, pixels: bool = False, size: int = SIZE) -> list[int]:
    """Return the numbers of a benchmark folder's cases, in the order of its list.

    A UserError lists what :func:`find_problems` finds; it explains the arguments.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no benchmark folder '{folder}'; pbe benchmark build makes one")
    problems = find_problems(folder, pixels=pixels, size=size)
    if problems:
        shown = "; ".join(problems[:PROBLEMS_SHOWN])
        rest = len(problems) - PROBLEMS_SHOWN
        raise UserError(
            f"'{folder}' is not a complete benchmark: {shown}{f'; and {rest} more' if rest > 0 else ''}"
        )
    return _read_ids(folder, [])


class ReadOnDemand(Sequence[T]):
    """A sequence whose items are read when they are asked for, one or a slice."""

    @abstractmethod
    def read(self, index: int) -> T:
        """Read an item; a negative index counts from the end."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        """Read an item, or several."""
        if isinstance(index, slice):
            return [self.read(each) for each in range(*index.indices(len(self)))]
        return self.read(index)


class BenchmarkFolder(ReadOnDemand[Case]):
    """The cases of a folder in COCOEE's layout, of any image size, read when they are asked for.

    Args:
        folder: the ``test_bench`` folder.
        first: take so many cases, the first of the list; 0 means all of them.

    Attributes:
        ids: of the cases, in the order of the list.
        numbers: of all cases of the folder, also where the first ones are taken.
    """

    def __init__(self, folder: str | Path, first: int = 0) -> None:
        self.folder = Path(folder)
        self.numbers = read_benchmark(self.folder)
        if not 0 <= first <= len(self.numbers):
            raise UserError(f"'{folder}' has {len(self.numbers)} cases, so not the first {first}")
        self._first = self.numbers[: first or None]
        self.ids = [case_id(number) for number in self._first]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Case:
        """Read a case; damaged files and masks that do not fit or are empty are UserErrors."""
        paths = case_paths(self.folder, self._first[index])
        image, mask = read_image(paths[0]), read_image(paths[1], "L")
        if mask.shape != image.shape[:2]:
            (h, w), (height, width) = mask.shape, image.shape[:2]
            raise UserError(
                f"'{paths[1]}' has another size than its image: {w} x {h}, the image {width} x {height}"
            )
        mask = np.where(mask > 127, 255, 0).astype(np.uint8)
        if not mask.any():
            raise UserError(f"'{paths[1]}' is black: it masks nothing")
        return Case(self.ids[index], image, mask, read_image(paths[2]))

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every image, from the files' headers."""
        return [_header_size(case_paths(self.folder, number)[0]) for number in self._first]

    @cached_property
    def sha256(self) -> str:
        """Names the cases: the hash of all ids and files' bytes, in the order of the list."""
        return self._hash(self._first)

    @cached_property
    def whole_sha256(self) -> str:
        """The same of all cases of the folder, where the first ones are taken."""
        return self.sha256 if len(self) == len(self.numbers) else self._hash(self.numbers)

    def _hash(self, numbers: Iterable[int]) -> str:
        digest = hashlib.sha256()
        for number in numbers:
            for path in case_paths(self.folder, number):
                content = path.read_bytes()
                digest.update(f"{case_id(number)} {path.parent.name} {len(content)}\n".encode())
                digest.update(content)
        return digest.hexdigest()


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except UNREADABLE as error:
        raise UserError(f"'{path}' cannot be read as an image: {error}") from error
