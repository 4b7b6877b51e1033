"""The toy benchmark as files in COCOEE's layout, so that it is generated and scored as the paper's is."""

from __future__ import annotations

from pathlib import Path

import cv2

from pbe.data.toy.scenes import ToyWorld
from pbe.errors import UserError
from pbe.evaluation.benchmark.files import new_benchmark, write_case, write_ids
from pbe.evaluation.benchmark.toy import check_count, make_case

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

    The pictures are those of :func:`~pbe.evaluation.benchmark.toy.make_benchmark` with the same seed and
    sizes, bit for bit. The folder is there when all of it is.

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
    with new_benchmark(folder) as partial:
        for index in range(count):
            case = make_case(world, index, seed, image_size, exemplar_size)
            image, exemplar = (cv2.cvtColor(one, cv2.COLOR_RGB2BGR) for one in (case.image, case.exemplar))
            write_case(partial, index, image, case.mask, exemplar)
        write_ids(partial, range(count))
    return count
