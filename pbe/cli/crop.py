"""``pbe benchmark crop``: real images as squares, for the paper's FID."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pbe.cli.arguments import Count, options
from pbe.errors import UserError

if TYPE_CHECKING:
    import numpy as np


@options
class CropSettings:
    """Options of ``pbe benchmark crop``."""

    images: Path
    """folder of real images"""
    out: Path
    """folder for the squares, PNG"""
    size: Count = 512
    """side of the squares, pixels"""
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    """filter for resizing; the paper's is bilinear"""
    workers: Count | None = None
    """number of processes (default: one per core)"""


def crop(*, settings: CropSettings) -> None:
    """Resize real images to a shorter side of 512 px and crop the centre, as the paper's FID does.

    pbe benchmark crop --images downloads/test2017 --out downloads/test2017_512

    The same command resumes: existing squares are not made again.
    """
    print(f"{settings.out}: {make_squares(settings)} squares made")


def make_squares(settings: CropSettings) -> int:
    """Write the squares that are missing; return how many were made."""
    from concurrent.futures import ProcessPoolExecutor

    from tqdm import tqdm

    from pbe.evaluation.metrics.sets import ImageFolder
    from pbe.files import make_folder

    paths = ImageFolder(settings.images).paths
    name, times = Counter(path.stem for path in paths).most_common(1)[0]
    if times > 1:
        raise UserError(f"'{settings.images}' holds {times} images with the name '{name}'")
    out = make_folder(settings.out)
    if out.resolve() == settings.images.resolve():
        raise UserError("--out is the folder of the images itself; name another")
    make_square = partial(_square, size=settings.size, resampling=settings.filter)
    waiting = [path for path in paths if not _target(path, out).exists()]
    _check_earlier([path for path in paths if _target(path, out).exists()], out, make_square)
    make = partial(_write, out=out, make_square=make_square)
    bar = partial(tqdm, total=len(waiting), desc="squares", file=sys.stderr, disable=None)
    workers = settings.workers or os.cpu_count() or 1
    if workers == 1:
        return sum(map(make, bar(waiting)))
    with ProcessPoolExecutor(workers) as pool:
        return sum(bar(pool.map(make, waiting, chunksize=16)))


def _target(source: Path, out: Path) -> Path:
    return out / f"{source.stem}.png"


def _check_earlier(done: list[Path], out: Path, make_square: Callable[[Path], np.ndarray]) -> None:
    """Make the first square that is there once more: others of the folder were made as it was."""
    import numpy as np

    from pbe.evaluation.metrics.sets import read_image

    for source in done[:1]:
        try:
            found = read_image(_target(source, out))
        except UserError:
            return  # scoring names it
        if not np.array_equal(found, make_square(source)):
            raise UserError(f"'{out}' holds squares of another size, filter or image; name another folder")


def _square(source: Path, size: int, resampling: str) -> np.ndarray:
    import numpy as np
    from PIL import Image

    from pbe.evaluation.metrics.sets import read_image
    from pbe.evaluation.metrics.towers import centre_crop

    kernel = Image.Resampling[resampling.upper()]
    return np.ascontiguousarray(centre_crop(read_image(source), size, kernel))


def _write(source: Path, out: Path, make_square: Callable[[Path], np.ndarray]) -> int:
    from PIL import Image

    from pbe.editing.batch.records import write_image

    write_image(_target(source, out), Image.fromarray(make_square(source)))
    return 1
