"""A benchmark whose exemplars are the hidden objects themselves: what copying them is the answer to."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from pbe.data.coco_ee import GT, ID_LIST, MASK, PARTS, REF, case_path
from pbe.data.crops import resize
from pbe.data.packing_index import write_whole
from pbe.errors import UserError
from pbe.evaluation.benchmark.cases import BenchmarkFolder
from pbe.evaluation.metrics.features import region
from pbe.files import make_folder


def write_own_exemplars(source: Path, folder: Path, exemplar_size: int) -> int:
    """Write a benchmark's cases to a new folder with the true object, cut by its mask's box, as exemplar.

    A model that copies its exemplar paints such a case best of all, and pays for it where the exemplar
    stands in another pose; one that has understood the object loses nothing. ``id_list.npy`` comes last: a
    folder without it is not whole.

    Args:
        source: a benchmark in COCOEE's layout.
        folder: made when missing; must be empty.
        exemplar_size: sides of the exemplars, pixels.

    Returns:
        The number of cases.

    Raises:
        UserError: the folder holds something, or a case of the source cannot be read.
    """
    cases = BenchmarkFolder(source)
    if any(make_folder(folder).iterdir()):
        raise UserError(f"'{folder}' is not empty; name a new folder")
    for name, _ in PARTS:
        make_folder(folder / name)
    for case in cases:
        number = int(case.id)
        exemplar = resize(region(case.image, case.mask), exemplar_size, exemplar_size)
        for part, picture in ((GT, case.image), (MASK, case.mask), (REF, exemplar)):
            turned = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
            write_whole(case_path(folder, part, number), cv2.imencode(".png", turned)[1].tobytes())
    with (folder / ID_LIST).open("wb") as file:
        np.save(file, np.array([int(each) for each in cases.ids], np.int64), allow_pickle=False)
    return len(cases)
