"""Measure the way from annotations as large as those of Open Images to the packing plan (Linux only).

python scripts/benchmarks/annotations.py                             # 14.6 million boxes: 5 GB of disk
python scripts/benchmarks/annotations.py --rows 9000 --images 1000   # something small

The annotations are synthetic, the images names of a file without content: planning asks for their size alone.
"""

from __future__ import annotations

import argparse
import json
import os
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import polars as pl

from pbe.data.randomness import generator
from pbe.errors import UserError
from pbe.files import make_folder
from scripts.benchmarks.common import (
    add_folder,
    command_line,
    machine,
    make_parser,
    print_rows,
    read_options,
    write,
)

ROWS, IMAGES = 14_600_000, 1_740_000  # of the training set of Open Images
LABELS = 600
IMAGE_BYTES = 295_000  # 513 GB over 1.74 million
LINKS = 60_000  # a file may have 65,000 names on ext4
BATCH_ROWS = 500_000
BOXES_NAME, LICENCES_NAME = "oidv6-train-annotations-bbox.csv", "train-images-boxable-with-rotation.csv"
FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
CLICKS = [f"XClick{number}{axis}" for axis in "XY" for number in range(1, 5)]


def _box_rows(ids: pl.Series, rows: int, seed: tuple[str, int]) -> pl.DataFrame:
    """Return rows with the columns of Open Images, version 6, in its order."""
    rng = generator(*seed)
    middle, side = rng.random((2, rows)), rng.beta(1.1, 2.2, (2, rows))
    low, high = np.clip(middle - side / 2, 0, 1), np.clip(middle + side / 2, 0, 1)
    columns: dict[str, Any] = {
        "ImageID": ids.gather(np.sort(rng.integers(0, len(ids), rows))),
        "Source": pl.Series(["xclick"]).gather(np.zeros(rows, np.int64)),
        "LabelName": pl.Series([f"/m/0{number:04x}" for number in range(LABELS)]).gather(
            np.minimum(rng.geometric(0.02, rows), LABELS) - 1
        ),
        "Confidence": np.ones(rows, np.int8),
        "XMin": low[0],
        "XMax": high[0],
        "YMin": low[1],
        "YMax": high[1],
    }
    columns |= {name: (rng.random(rows) < 0.2).astype(np.int8) for name in FLAGS}
    columns |= {name: (low if name.endswith("X") else high)[number % 2] for number, name in enumerate(CLICKS)}
    return pl.DataFrame(columns)


def _write_csv(path: Path, tables: Sequence[Callable[[], pl.DataFrame]]) -> None:
    with path.open("wb") as file:
        for number, make in enumerate(tables):
            make().write_csv(file, include_header=number == 0, float_precision=6)


def _link_images(folder: Path, names: Sequence[str]) -> None:
    """Give every image a name in its folder, and the bytes of an image that take no room on the disk."""
    for letter in string.hexdigits[:16]:
        (folder / f"train_{letter}").mkdir(parents=True)
    for number, name in enumerate(names):
        if number % LINKS == 0:
            source = folder / f".image-{number // LINKS}"
            source.touch()
            os.truncate(source, IMAGE_BYTES)
        os.link(source, f"{folder}/train_{name[0]}/{name}.jpg")


def synthetic_open_images(folder: Path, images: int, rows: int) -> None:
    """Write the annotations and the folders of an Open Images of any size; the images hold nothing.

    Rows are sorted by image within each half million. The twentieth part of them belongs to images that
    are not there.

    Args:
        folder: made.
        images: files, names of one file that is as long as an image and takes no room.
        rows: of the CSV of boxes, 21 columns; a second CSV has licence and author of every image.
    """
    make_folder(folder)
    numbers = generator("open images", "names").integers(0, 2**63, images + max(images // 19, 1))
    ids = pl.Series([f"{number:016x}" for number in np.unique(numbers).tolist()]).shuffle(seed=0)
    names = ids.head(images)
    _link_images(folder, names.to_list())
    batches = [min(BATCH_ROWS, rows - start) for start in range(0, rows, BATCH_ROWS)]
    _write_csv(
        folder / BOXES_NAME,
        [lambda n=n, s=s: _box_rows(ids, n, ("open images", s)) for s, n in enumerate(batches)],  # type: ignore[misc]
    )

    def facts() -> pl.DataFrame:
        """Return the table of image facts: made here, so that it is gone once it is written."""
        columns = {"ImageID": names, "Subset": pl.Series(["train"]).gather(np.zeros(len(names), np.int64))}
        text = {
            name: pl.lit(f"https://example.org/{name}/") + pl.col("ImageID").str.slice(0, size)
            for name, size in (("OriginalURL", 16), ("License", 0), ("AuthorProfileURL", 4), ("Author", 4))
        }
        return pl.DataFrame(columns).with_columns(**text)

    _write_csv(folder / LICENCES_NAME, [facts])


# Run in a fresh process. VmHWM: ru_maxrss would count the process that started this one too.
PLANNING = """
import json, sys, time
from pathlib import Path
from pbe.data.packing.pack import plan_requests
from pbe.data.packing.plan import PackSettings
from pbe.data.packing.pack import PackRequest
from pbe.data.sources import SourceOptions, read_source
source, out = sys.argv[1:]
request = PackRequest(lambda: [read_source(source, SourceOptions())], [source], PackSettings(), Path(out))
start, used = time.perf_counter(), time.process_time()
plan_requests([request])
plan = request.read_plan()
status = Path("/proc/self/status").read_text().splitlines()
print(json.dumps({
    **json.loads((request.work / "times.json").read_bytes()), "whole": time.perf_counter() - start,
    "cpu": time.process_time() - used,
    "images": plan["shards"][-1], "shards": len(plan["shards"]), "boxes_seen": plan["boxes_seen"],
    "boxes": plan["boxes_seen"] - sum(plan["dropped_boxes"].values()),
    "peak_mib": next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024,
}))
"""


def measure_annotations(folder: Path, out: Path) -> dict[str, float]:
    """Read Open Images and write the packing plan, with default settings, in a fresh process (Linux only).

    Args:
        folder: of Open Images.
        out: for the plan; must not exist.

    Returns:
        Seconds by stage (without the start of Python) and, as ``cpu``, of all cores together; counts; and
        ``peak_mib``, the most memory at any time.
    """
    command = [sys.executable, "-c", PLANNING, f"open-images:{folder}", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Write the annotations, plan their packing, and return the table."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        synthetic_open_images(folder / "open-images", options.images, options.rows)
        numbers = measure_annotations(folder / "open-images", folder / "plan")
    rows: dict[str, dict[str, float]] = {
        "boxes in the CSV": {"count": numbers["boxes_seen"]},
        "boxes planned": {"count": numbers["boxes"]},
        "images planned": {"count": numbers["images"]},
        "shards": {"count": numbers["shards"]},
        **{stage: {"seconds": numbers[stage]} for stage in ("read annotations", "plan", "whole", "cpu")},
        "peak memory": {"MiB": numbers["peak_mib"]},
    }
    title = "annotations of Open Images"
    print_rows(title, rows)
    return {title: rows}


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option makes no sense.
    """
    parser = make_parser(__doc__, "annotations", takes=())
    add_folder(parser)
    parser.add_argument("--rows", type=int, default=ROWS, help="boxes in the CSV (%(default)s)")
    parser.add_argument("--images", type=int, default=IMAGES, help="files in the 16 folders (%(default)s)")
    options = read_options(parser, arguments)
    if min(options.rows, options.images) < 1:
        raise UserError("--rows and --images must be at least 1")
    print(machine())
    write(options, measure(options))


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
