"""A benchmark whose exemplars are the hidden objects themselves: what copying them is the answer to."""

from __future__ import annotations

from pathlib import Path

import cv2

from pbe.data.samples.crops import resize
from pbe.evaluation.benchmark.cases import BenchmarkFolder
from pbe.evaluation.benchmark.files import new_benchmark, write_case, write_ids
from pbe.evaluation.metrics.features import region


def write_own_exemplars(source: Path, folder: Path, exemplar_size: int) -> int:
    """Write a benchmark's cases to a new folder with the true object, cut by its mask's box, as exemplar.

    A model that copies its exemplar paints such a case best of all, and pays for it where the exemplar
    stands in another pose; one that has understood the object loses nothing. The folder is there when all
    of it is.

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
    with new_benchmark(folder) as partial:
        for case in cases:
            exemplar = resize(region(case.image, case.mask), exemplar_size, exemplar_size)
            image, exemplar = (cv2.cvtColor(one, cv2.COLOR_RGB2BGR) for one in (case.image, exemplar))
            write_case(partial, int(case.id), image, case.mask, exemplar)
        write_ids(partial, map(int, cases.ids))
    return len(cases)
