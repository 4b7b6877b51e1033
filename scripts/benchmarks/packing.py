"""Measures packing: annotations of the size of Open Images, images a second, and runs that are killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from pbe.data.packing.pack import PACK_LOCK, read_summary
from pbe.data.packing.report import HTML_NAME, JSON_NAME
from pbe.data.packing.worker import index_keys, load_index
from pbe.data.randomness import generator
from pbe.data.shards.format import MANIFEST_NAME
from pbe.errors import UserError
from pbe.files import make_folder, sha256_of
from scripts.benchmarks.loading import synthetic_picture

OPEN_IMAGES_ROWS, OPEN_IMAGES_PICTURES = 14_600_000, 1_740_000
LABELS = 600
PICTURE_BYTES = 295_000  # 513 GB over 1.74 million
LINKS = 60_000  # a file may have 65,000 names on ext4
BATCH_ROWS = 500_000
BOXES_NAME, LICENCES_NAME = "oidv6-train-annotations-bbox.csv", "train-images-boxable-with-rotation.csv"
FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
CLICKS = [f"XClick{number}{axis}" for axis in "XY" for number in range(1, 5)]
DISTINCT = 64
Command = Callable[[Path], Sequence[str]]


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


def _link_pictures(folder: Path, names: Sequence[str]) -> None:
    """Give every image a name in its folder, and the bytes of an image that take no room on the disk."""
    for letter in string.hexdigits[:16]:
        (folder / f"train_{letter}").mkdir(parents=True)
    for number, name in enumerate(names):
        if number % LINKS == 0:
            source = folder / f".picture-{number // LINKS}"
            source.touch()
            os.truncate(source, PICTURE_BYTES)
        os.link(source, f"{folder}/train_{name[0]}/{name}.jpg")


def synthetic_open_images(folder: Path, pictures: int, rows: int) -> None:
    """Write the annotations and the folders of an Open Images of any size; the images hold nothing.

    Rows are sorted by image within each half million. The twentieth part of them belongs to images that
    are not there.

    Args:
        folder: made.
        pictures: files, names of one file that is as long as an image and takes no room.
        rows: of the CSV of boxes, 21 columns; a second CSV has licence and author of every image.
    """
    make_folder(folder)
    numbers = generator("open images", "names").integers(0, 2**63, pictures + max(pictures // 19, 1))
    ids = pl.Series([f"{number:016x}" for number in np.unique(numbers).tolist()]).shuffle(seed=0)
    names = ids.head(pictures)
    _link_pictures(folder, names.to_list())
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
    "pictures": plan["shards"][-1], "shards": len(plan["shards"]), "boxes_seen": plan["boxes_seen"],
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


def synthetic_source(folder: Path, count: int, width: int, height: int, quality: int) -> Path:
    """Write JPEGs and a CSV of two boxes each; return the CSV.

    There are :data:`DISTINCT` images; every file has a comment of its own, so no two have the same bytes.
    """
    make_folder(folder / "pictures")
    encoded = [
        cv2.imencode(".jpg", synthetic_picture(number, width, height), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        for number in range(min(count, DISTINCT))
    ]
    lines = ["file,x1,y1,x2,y2,label"]
    for number in range(count):
        data = encoded[number % len(encoded)].tobytes()
        comment = f"{number:016d}".encode()
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big")
        (folder / "pictures" / f"p{number:06d}.jpg").write_bytes(data[:2] + marker + comment + data[2:])
        for share in (0.5, 0.7):
            lines.append(f"p{number:06d}.jpg,8,8,{share * width:.1f},{share * height:.1f},label{number % 7}")
    path = folder / "boxes.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def _copy_and_hash(paths: Sequence[str], target: Path) -> int:
    """Copy files one after another into one, and hash each; the least that packing has to do."""
    with target.open("wb") as file:
        for path in paths:
            data = Path(path).read_bytes()
            hashlib.blake2b(data, digest_size=16).digest()
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    target.unlink()
    return len(paths)


@dataclass(frozen=True)
class PackingTimes:
    """What packing took.

    Attributes:
        copying: images a second of bare copying and hashing.
        packing: of the whole command, the start of Python and the report included.
        pictures: that were packed.
        cpu: milliseconds of CPU time an image, of the whole command with all of its processes.
        work: seconds from the command's first file to its last.
        stages: seconds, of all processes together.
    """

    copying: float
    packing: float
    pictures: int
    cpu: float
    work: float
    stages: dict[str, float]


def measure_copying(pictures: Path, folder: Path, workers: int, chunk: int) -> float:
    """Return images a second of reading, hashing and writing alone, which run beside each other in threads.

    Args:
        pictures: folder of files.
        folder: is written to, and left as it was.
        workers: threads.
        chunk: files that are written into one.
    """
    paths = sorted(str(path) for path in pictures.iterdir())
    chunks = [paths[start : start + chunk] for start in range(0, len(paths), chunk)]
    targets = [folder / f"copy-{number}" for number in range(len(chunks))]
    start = time.perf_counter()
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        done = sum(pool.map(_copy_and_hash, chunks, targets))
    return done / (time.perf_counter() - start)


def measure_packing(table: Path, command: Command, *, workers: int, chunk: int) -> PackingTimes:
    """Pack a CSV and its images from the start of the command to its end, report and all.

    Args:
        table: of :func:`synthetic_source`.
        command: packs it.
        workers: threads for bare copying.
        chunk: files that bare copying writes into one.
    """
    copying = measure_copying(table.parent / "pictures", table.parent, workers, chunk)
    out = table.parent / "straight"
    start, used = time.perf_counter(), _children_cpu()
    _finish(command(out))
    seconds, used = time.perf_counter() - start, _children_cpu() - used
    report = json.loads((out / JSON_NAME).read_bytes())
    count = report["pictures"]["kept"]
    # The lock of packing appears when the plan is written.
    packing = (out / MANIFEST_NAME).stat().st_mtime - (out / PACK_LOCK).stat().st_mtime
    work = report["seconds"]["read annotations"] + report["seconds"]["plan"] + packing
    return PackingTimes(copying, count / seconds, count, 1e3 * used / count, work, report["seconds"])


def _children_cpu() -> float:
    """Return the CPU seconds of all processes that this one, or one it started, has waited for."""
    times = os.times()
    return times.children_user + times.children_system


@dataclass(frozen=True)
class KillResult:
    """What came of killing and resuming.

    Attributes:
        shards_left: whole shards that each kill left behind.
        faults: what differs from a packing that was left alone, a line each.
    """

    shards_left: list[int]
    faults: list[str]


def packed_files(out: Path) -> dict[str, str]:
    """Return the hashes of what a packing left, by name, but for the report's, which hold times."""
    found = {}
    for path in sorted(out.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name not in (JSON_NAME, HTML_NAME):
            found[path.name] = sha256_of(path)
    return found


def differences(out: Path, straight: Path, pictures: int) -> list[str]:
    """Return what tells a resumed packing from an uninterrupted one, and whether all images are there once.

    Args:
        out: folder of the resumed one.
        straight: of the other.
        pictures: that must be there.
    """
    ours, theirs = packed_files(out), packed_files(straight)
    faults = [f"{name} is missing" for name in sorted(set(theirs) - set(ours))]
    faults += [f"{name} is too many" for name in sorted(set(ours) - set(theirs))]
    faults += [
        f"{name} has other bytes" for name in sorted(set(ours) & set(theirs)) if ours[name] != theirs[name]
    ]
    summary = read_summary(out)
    if summary is None:
        return [*faults, f"there is no {MANIFEST_NAME}"]
    keys = [key for shard in summary["shards"] for key in index_keys(load_index(out / shard["index"]))]
    if len(keys) != pictures or len(set(keys)) != pictures:
        faults.append(f"{len(keys)} images of {len(set(keys))} names instead of {pictures}")
    reports = [json.loads((folder / JSON_NAME).read_bytes()) for folder in (out, straight)]
    for report in reports:
        del report["seconds"]
    if reports[0] != reports[1]:
        faults.append("the report counts otherwise")
    return faults


def _finish(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"packing failed with status {done.returncode}: {done.stderr.strip()[-500:]}")


def _run_for(command: Sequence[str], seconds: float, out: Path) -> bool:
    """Run a packing and kill it, with all of its processes, some seconds after it began to work.

    Returns:
        Whether it was killed; False where it was done before.
    """
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    log = out / ".packing" / "request.json"
    before = log.stat().st_mtime_ns if log.exists() else 0
    with subprocess.Popen(command, start_new_session=True, **silent) as process:  # type: ignore[call-overload]
        # Every run writes this file when it begins.
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.002)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return True
    if process.returncode:
        raise UserError(
            f"a resumed packing failed with status {process.returncode}; '{out}' holds what it left"
        )
    return False


def kill_and_resume(
    command: Command, straight: Path, pictures: int, kills: int, seconds: float, seed: int = 0
) -> KillResult:
    """Kill packing at random moments, go on after each, and compare with a packing that was left alone.

    Each run is killed at a moment drawn evenly from the time that it works; where one is done before its
    moment, it is compared and the next begins anew.

    Args:
        command: packs into a folder.
        straight: what it packed when it was left alone.
        pictures: that both must hold.
        kills: number of runs to kill.
        seconds: latest moment; several times less than a packing takes, so that kills meet all of it.
        seed: of the moments.
    """
    out = straight.with_name("killed")
    rng = generator("kills", seed)
    left: list[int] = []
    faults: list[str] = []
    while len(left) < kills:
        if _run_for(command(out), rng.uniform(0.0, seconds), out):
            left.append(len(list(out.glob("shard-*.tar"))))
        else:
            faults += differences(out, straight, pictures)
            shutil.rmtree(out)
    _finish(command(out))
    return KillResult(left, faults + differences(out, straight, pictures))
