"""Measure packing: images a second against bare copying, and runs that are killed and go on.

python scripts/benchmarks/packing.py --folder /fast/disk              # 10,000 images of 1024 x 768
python scripts/benchmarks/packing.py --folder /fast/disk --kills 10   # and killed that often
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2

from pbe.data.packing.pack import PACK_LOCK, read_summary
from pbe.data.packing.report import HTML_NAME, JSON_NAME
from pbe.data.packing.worker import index_keys, load_index
from pbe.data.randomness import generator
from pbe.data.shards.format import MANIFEST_NAME
from pbe.errors import UserError
from pbe.files import make_folder, sha256_of
from scripts.benchmarks.common import (
    add_folder,
    command_line,
    machine,
    make_parser,
    print_rows,
    read_options,
    write,
)
from scripts.benchmarks.loading import synthetic_image

DISTINCT = 64
IMAGES_FOLDER = "images"  # of what is packed
Command = Callable[[Path], Sequence[str]]


def synthetic_source(folder: Path, count: int, width: int, height: int, quality: int) -> Path:
    """Write JPEGs and a CSV of two boxes each; return the CSV.

    There are :data:`DISTINCT` images; every file has a comment of its own, so no two have the same bytes.
    """
    images = make_folder(folder / IMAGES_FOLDER)
    encoded = [
        cv2.imencode(".jpg", synthetic_image(number, width, height), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        for number in range(min(count, DISTINCT))
    ]
    lines = ["file,x1,y1,x2,y2,label"]
    for number in range(count):
        data = encoded[number % len(encoded)].tobytes()
        comment = f"{number:016d}".encode()
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big")
        (images / f"p{number:06d}.jpg").write_bytes(data[:2] + marker + comment + data[2:])
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
        images: that were packed.
        cpu: milliseconds of CPU time an image, of the whole command with all of its processes.
        work: seconds from the command's first file to its last.
        stages: seconds, of all processes together.
    """

    copying: float
    packing: float
    images: int
    cpu: float
    work: float
    stages: dict[str, float]


def measure_copying(images: Path, folder: Path, workers: int, chunk: int) -> float:
    """Return images a second of reading, hashing and writing alone, which run beside each other in threads.

    Args:
        images: folder of files.
        folder: is written to, and left as it was.
        workers: threads.
        chunk: files that are written into one.
    """
    paths = sorted(str(path) for path in images.iterdir())
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
    copying = measure_copying(table.parent / IMAGES_FOLDER, table.parent, workers, chunk)
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


def differences(out: Path, straight: Path, images: int) -> list[str]:
    """Return what tells a resumed packing from an uninterrupted one, and whether all images are there once.

    Args:
        out: folder of the resumed one.
        straight: of the other.
        images: that must be there.
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
    if len(keys) != images or len(set(keys)) != images:
        faults.append(f"{len(keys)} images of {len(set(keys))} names instead of {images}")
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
    command: Command, straight: Path, images: int, kills: int, seconds: float, seed: int = 0
) -> KillResult:
    """Kill packing at random moments, go on after each, and compare with a packing that was left alone.

    Each run is killed at a moment drawn evenly from the time that it works; where one is done before its
    moment, it is compared and the next begins anew.

    Args:
        command: packs into a folder.
        straight: what it packed when it was left alone.
        images: that both must hold.
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
            faults += differences(out, straight, images)
            shutil.rmtree(out)
    _finish(command(out))
    return KillResult(left, faults + differences(out, straight, images))


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Pack synthetic images, kill and resume packing where that is asked for, and return the tables.

    Raises:
        UserError: packing failed.
        SystemExit: a packing that was killed and resumed came out otherwise.
    """
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        table = synthetic_source(folder, options.images, options.width, options.height, options.quality)

        def command(out: Path) -> list[str]:
            limits = ["--workers", str(options.workers), "--shard-images", str(options.shard_images)]
            limits += ["--no-perceptual"] if options.no_perceptual else []
            source = f"csv:{table}@{folder / IMAGES_FOLDER}"
            return [sys.executable, "-m", "pbe.cli", "prepare", source, "--out", str(out), *limits]

        times = measure_packing(table, command, workers=options.workers, chunk=options.shard_images)
        tables = packing_tables(times)
        for title, rows in tables.items():
            print_rows(title, rows)
        if options.kills:
            latest = times.work * min(3 / options.kills, 1)
            killed = kill_and_resume(command, folder / "straight", options.images, options.kills, latest)
            tables["whole shards that each kill left"] = report_kills(killed)
    return tables


def packing_tables(times: PackingTimes) -> dict[str, dict[str, dict[str, float]]]:
    """Return the rates beside bare copying, and what each stage took."""
    rates = {"copying and hashing alone": times.copying, "packing": times.packing}
    stages = {
        stage: {"seconds": spent, "ms an image": 1e3 * spent / times.images}
        for stage, spent in times.stages.items()
    }
    stages["first file to last, wall time"] = {"seconds": times.work}
    stages["CPU time of everything"] = {"ms an image": times.cpu}
    return {
        f"{times.images} images": {
            name: {"a second": rate, "of copying": rate / times.copying} for name, rate in rates.items()
        },
        "stages, wall time of all processes": stages,
    }


def report_kills(killed: KillResult) -> dict[str, dict[str, float]]:
    """Print what came of killing and resuming; returns the shards that each kill left.

    Raises:
        SystemExit: what was resumed is not what was packed at once.
    """
    left = ", ".join(str(count) for count in killed.shards_left)
    print(f"\n{len(killed.shards_left)} kills, which left {left} whole shards")
    if killed.faults:
        raise SystemExit(f"error: resumed is not what was packed at once: {'; '.join(killed.faults)}")
    print("resumed: the same bytes as packed at once, every image once")
    return {f"kill {number}": {"shards": count} for number, count in enumerate(killed.shards_left, 1)}


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option makes no sense, or packing failed.
    """
    parser = make_parser(__doc__, "packing", takes=())
    add_folder(parser)
    parser.add_argument("--images", type=int, default=10_000, help="number of synthetic images")
    parser.add_argument("--width", type=int, default=1024, help="of the images")
    parser.add_argument("--height", type=int, default=768, help="of the images")
    parser.add_argument("--quality", type=int, default=90, help="of their JPEG encoding")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that pack")
    parser.add_argument("--shard-images", type=int, default=500, help="images a shard")
    parser.add_argument("--no-perceptual", action="store_true", help="no hashes of near duplicates")
    parser.add_argument("--kills", type=int, default=0, help="kill and resume it that often, and compare")
    options = read_options(parser, arguments)
    counts = (options.images, options.width, options.height, options.shard_images)
    if min(counts) < 1 or min(options.kills, options.workers) < 0:
        raise UserError("numbers must be at least 1, --kills and --workers at least 0")
    print(machine())
    write(options, measure(options))


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
