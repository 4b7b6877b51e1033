"""Crop real images to squares for the paper's FID: the shorter side to 512 px, bilinear, the middle cut out.

python scripts/crop_pictures.py --pictures downloads/test2017 --out downloads/test2017_512
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pbe.cli.parser import Parser, run_command
from pbe.editing.batch.records import write_picture
from pbe.errors import UserError
from pbe.evaluation.metrics.sets import ImageFolder, read_image
from pbe.evaluation.metrics.towers import centre_crop
from pbe.files import make_folder

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of real pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for the squares, PNG")
    parser.add_argument("--size", type=int, default=512, help="side, pixels (default %(default)s)")
    parser.add_argument(
        "--filter",
        choices=list(FILTERS),
        default="bilinear",
        help="default, the paper's: %(default)s",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: one a core")
    return parser.parse_args(arguments)


def crop(options: argparse.Namespace) -> int:
    """Write the squares that are missing; return how many were made.

    Raises:
        UserError: an option or a picture cannot be used, two pictures have one name but for the ending, or
            the folder holds squares of another size or filter.
    """
    if options.size < 1 or options.workers < 1:
        raise UserError("--size and --workers must be at least 1")
    paths = ImageFolder(options.pictures).paths
    name, times = Counter(path.stem for path in paths).most_common(1)[0]
    if times > 1:
        raise UserError(f"'{options.pictures}' holds {times} pictures with the name '{name}'")
    out = make_folder(options.out)
    if out.resolve() == options.pictures.resolve():
        raise UserError("--out is the folder of the pictures itself; name another")
    make_square = partial(_square, size=options.size, resampling=FILTERS[options.filter])
    waiting = [path for path in paths if not _target(path, out).exists()]
    _check_earlier([path for path in paths if _target(path, out).exists()], out, make_square)
    make = partial(_write, out=out, make_square=make_square)
    bar = partial(tqdm, total=len(waiting), desc="squares", file=sys.stderr, disable=None)
    if options.workers == 1:
        return sum(map(make, bar(waiting)))
    with ProcessPoolExecutor(options.workers) as pool:
        return sum(bar(pool.map(make, waiting, chunksize=16)))


def _target(source: Path, out: Path) -> Path:
    return out / f"{source.stem}.png"


def _check_earlier(done: list[Path], out: Path, make_square: Callable[[Path], np.ndarray]) -> None:
    """Make the first square that is there once more: others of the folder were made as it was."""
    for source in done[:1]:
        try:
            found = read_image(_target(source, out))
        except UserError:
            return  # scoring names it
        if not np.array_equal(found, make_square(source)):
            raise UserError(f"'{out}' holds squares of another size, filter or picture; name another folder")


def _square(source: Path, size: int, resampling: Image.Resampling) -> np.ndarray:
    return np.ascontiguousarray(centre_crop(read_image(source), size, resampling))


def _write(source: Path, out: Path, make_square: Callable[[Path], np.ndarray]) -> int:
    write_picture(_target(source, out), Image.fromarray(make_square(source)))
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""

    def body() -> None:
        options = parse(arguments)
        print(f"{options.out}: {crop(options)} squares made")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
