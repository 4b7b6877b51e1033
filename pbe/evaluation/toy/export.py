"""The toy benchmark as files in COCOEE's layout, so that it is generated and scored as the paper's is."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from pbe.data.coco_ee import GT, ID_LIST, MASK, PARTS, REF, case_path
from pbe.data.packing_index import write_whole
from pbe.data.toy_world import ToyWorld
from pbe.errors import UserError
from pbe.evaluation.toy.benchmark import BenchmarkCase, check_count, make_case
from pbe.files import make_folder

IMAGE_SIZE, EXEMPLAR_SIZE = 64, 128  # what the toy model that ships was trained at


def export_toy_benchmark(
    world: ToyWorld,
    folder: Path,
    seed: int = 0,
    *,
    image_size: int = IMAGE_SIZE,
    exemplar_size: int = EXEMPLAR_SIZE,
    objects: int = 0,
) -> int:
    """Write the toy benchmark to a new folder; a case's number is its object's place in the archive.

    The pictures are those of :func:`~pbe.evaluation.toy.benchmark.make_benchmark` with the same seed and
    sizes, bit for bit. ``id_list.npy`` comes last: a folder without it is not whole.

    Args:
        world: objects and panoramas.
        folder: made when missing; must be empty.
        seed: of all draws.
        image_size: sides of the scenes, pixels.
        exemplar_size: sides of the exemplars, pixels.
        objects: the first so many test objects; 0 means all 181.

    Returns:
        The number of cases.

    Raises:
        UserError: the folder holds something, a size is below 16, or there are not that many objects.
    """
    if min(image_size, exemplar_size) < 16:
        raise UserError("pictures and exemplars of a benchmark need sides of at least 16 pixels")
    available = check_count(world, objects)
    count = objects or available
    if any(make_folder(folder).iterdir()):
        raise UserError(f"'{folder}' is not empty; name a new folder")
    for name, _ in PARTS:
        make_folder(folder / name)
    for index in range(count):
        _write(make_case(world, index, seed, image_size, exemplar_size), folder)
    with (folder / ID_LIST).open("wb") as file:
        np.save(file, np.arange(count, dtype=np.int64), allow_pickle=False)
    return count


def _write(case: BenchmarkCase, folder: Path) -> None:
    for part, picture in ((GT, case.image), (MASK, case.mask), (REF, case.exemplar)):
        turned = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        write_whole(case_path(folder, part, case.index), cv2.imencode(".png", turned)[1].tobytes())
