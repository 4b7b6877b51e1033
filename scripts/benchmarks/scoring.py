"""Time the scores of finished edits, beside bare reading of their files.

python scripts/benchmarks/scoring.py --count 1000 --size 512

The cases are a benchmark of the toy world; an edit is the image, its masked region filled from the border.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np

from pbe.data.toy.scenes import ToyWorld
from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import ID_LIST, PARTS, BenchmarkFolder, case_id, case_paths
from pbe.evaluation.benchmark.edits import EditFolder
from pbe.evaluation.benchmark.toy import make_case
from pbe.evaluation.metrics.scoring import ScoreSettings, score
from pbe.files import make_folder
from scripts.benchmarks.common import command_line, machine, make_parser, print_rows, read_options, write

EXEMPLAR = 224
DISTINCT = 100  # cases that are rendered; further ones are links to their files


def synthetic_edits(folder: Path, count: int, size: int) -> tuple[Path, Path]:
    """Write a benchmark and edits of it: scenes of the toy world, the mask filled from its border.

    Args:
        folder: made when missing.
        count: of cases.
        size: sides of the images, pixels.

    Returns:
        The folders of the benchmark and of the edits.
    """
    world, cases, edits = ToyWorld(), folder / "cases", make_folder(folder / "edits")
    for name, _ in PARTS:
        make_folder(cases / name)
    for number in range(min(count, DISTINCT)):
        case = make_case(world, number, 0, size, EXEMPLAR)
        edit = cv2.inpaint(case.image, (case.mask > 127).astype(np.uint8), 3, cv2.INPAINT_TELEA)
        images = case.image, case.mask, case.exemplar, edit
        for path, image in zip(_files(cases, edits, number), images, strict=True):
            cv2.imwrite(str(path), image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    for number in range(DISTINCT, count):
        pairs = zip(_files(cases, edits, number % DISTINCT), _files(cases, edits, number), strict=True)
        for source, target in pairs:
            os.link(source, target)
    with (cases / ID_LIST).open("wb") as file:
        np.save(file, np.arange(count, dtype=np.int64), allow_pickle=False)
    return cases, edits


def _files(cases: Path, edits: Path, number: int) -> list[Path]:
    return [*case_paths(cases, number), edits / f"{case_id(number)}.png"]


def measure_scoring(cases: Path, edits: Path) -> tuple[dict[str, float], list[str]]:
    """Time the scores of finished edits, all that run without weights from elsewhere, and bare reading.

    Returns:
        Seconds of reading alone, and of scoring, which reads too; and the names of the scores that ran.
    """
    benchmark = BenchmarkFolder(cases)
    folder = EditFolder(edits, benchmark)
    started = time.perf_counter()
    for place in range(len(benchmark)):
        _ = benchmark[place], folder[place]
    read = time.perf_counter()
    scores = score(benchmark, folder, ScoreSettings())
    seconds = {"reading alone": read - started, "scoring": time.perf_counter() - read}
    return seconds, [one.name for one in scores if one.run]


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option makes no sense.
    """
    parser = make_parser(__doc__, "scoring", takes=())
    parser.add_argument("--count", type=int, default=1000, help="edits (%(default)s)")
    parser.add_argument("--size", type=int, default=512, help="of the images, pixels (%(default)s)")
    options = read_options(parser, arguments)
    if options.count < 1 or options.size < 8:
        raise UserError("--count must be at least 1, --size at least 8")
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        seconds, ran = measure_scoring(*synthetic_edits(Path(folder), options.count, options.size))
    title = f"{options.count} edits of {options.size} px"
    rows = {name: {"seconds": spent} for name, spent in seconds.items()}
    print_rows(title, rows)
    print(f"\nscores: {', '.join(ran)}")
    write(options, {f"{title}: {', '.join(ran)}": rows})


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
