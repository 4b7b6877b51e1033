"""The files of a benchmark in COCOEE's layout: their names, and how a new folder of them is written.

A case is three PNGs that share an id of twelve digits, listed in ``id_list.npy`` (int64)::

    test_bench/GT_3500/000000000139_GT.png            source, 512 x 512
    test_bench/Mask_bbox_3500/000000000139_mask.png   white (255) is the hole, a filled box
    test_bench/Ref_3500/000000000139_ref.png          exemplar, any size
    test_bench/id_list.npy

The ids are file names and nothing else: many of the released ones are no ids of COCO.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from pbe.data.packing.records import write_whole
from pbe.errors import UserError
from pbe.files import make_folder

GT, MASK, REF = ("GT_3500", "GT"), ("Mask_bbox_3500", "mask"), ("Ref_3500", "ref")
PARTS = (GT, MASK, REF)
ID_LIST = "id_list.npy"


def case_path(folder: Path, part: tuple[str, str], number: int) -> Path:
    """Return the path of one file of a case; ``part`` is :data:`GT`, :data:`MASK` or :data:`REF`."""
    return folder / part[0] / f"{number:012d}_{part[1]}.png"


@contextmanager
def new_benchmark(folder: Path) -> Iterator[Path]:
    """Give a folder to write cases to, which takes its place only when all went well.

    Until then the cases lie in a hidden folder beside it, which goes away with whatever goes wrong; what a
    killed run left there is replaced.

    Args:
        folder: the new ``test_bench`` folder; it may be there if it is empty.

    Raises:
        UserError: the folder holds something, or nothing can be written there.
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
    """Write the three files of a case; images are uint8 ``h w 3``, BGR, masks ``h w``."""
    for part, pixels in ((GT, image), (MASK, mask), (REF, exemplar)):
        write_whole(case_path(folder, part, number), cv2.imencode(".png", pixels)[1].tobytes())


def write_ids(folder: Path, numbers: Iterable[int]) -> None:
    """Write the list of the cases, which comes last: a folder without it is not whole."""
    with (folder / ID_LIST).open("wb") as file:
        np.save(file, np.array(list(numbers), np.int64), allow_pickle=False)
