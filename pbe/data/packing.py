"""Packing annotated pictures into shards: on all cores or a cluster, resumable, the same bytes always.

While it goes on, the folder holds ``.packing/``: the plan, and a record of every shard that is done. A run
that was killed leaves whole shards and such records; started again, it packs what is not done.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe.data.index import MANIFEST_FORMAT, MANIFEST_NAME, MANIFEST_VERSION
from pbe.data.packing_index import read_summary, write_whole
from pbe.data.packing_plan import PackSettings, Plan, make_plan, save_plan
from pbe.data.packing_tally import Tally
from pbe.data.packing_task import pack_shard
from pbe.data.sources.records import Annotations
from pbe.errors import UserError
from pbe.files import make_folder

WORK = ".packing"
Sources = Callable[[], Sequence[Annotations]]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class PackRequest:
    """What is to be packed, and where.

    Attributes:
        sources: reads the annotations; called only where there is no plan yet.
        description: of the sources, as JSON has it; with the settings it tells one request from another.
        settings: what is kept and how.
        out: folder of the shards.
    """

    sources: Sources
    description: Sequence[str]
    settings: PackSettings
    out: Path

    @property
    def fingerprint(self) -> str:
        """Hash of the description and the settings."""
        request = json.dumps([list(self.description), self.settings.to_dict()], sort_keys=True)
        return hashlib.blake2b(request.encode(), digest_size=16).hexdigest()

    @property
    def work(self) -> Path:
        """Folder of the plan and of the records."""
        return self.out / WORK


@dataclass(frozen=True)
class PackResult:
    """What was packed: the summary in ``shards.json``, the counts of all shards, and of the plan."""

    summary: dict[str, Any]
    tally: Tally
    plan: dict[str, Any]


@contextlib.contextmanager
def _lock(folder: Path, name: str, mode: int, complaint: str) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, mode)
        except BlockingIOError as error:
            raise UserError(complaint) from error
        yield


def _check_folder(request: PackRequest, overwrite: bool) -> bool:
    """Return whether the folder is complete; clear it where it is to be overwritten.

    Raises:
        UserError: it holds something else.
    """
    summary = read_summary(request.out)
    if summary is not None and not overwrite:
        if summary["fingerprint"] == request.fingerprint:
            return True
        raise UserError(
            f"'{request.out}' holds shards of other sources or settings; name another folder or --overwrite"
        )
    if overwrite:
        _clear(request.out)
    marker = request.work / "request.json"
    if marker.is_file():
        if json.loads(marker.read_bytes())["fingerprint"] != request.fingerprint:
            raise UserError(
                f"'{request.out}' holds a half-done packing of other sources or settings; "
                "start it with the same ones, name another folder or use --overwrite"
            )
    elif any(request.out.glob("*.tar")):
        raise UserError(f"'{request.out}' holds shards that were not packed here; name another folder")
    request.work.mkdir(exist_ok=True)
    write_whole(marker, json.dumps({"fingerprint": request.fingerprint}).encode())
    return False


def _clear(out: Path) -> None:
    """Remove what packing wrote, the list of shards first, and nothing else."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for pattern in ("shard-*.tar", "shard-*.index.npz", "report.json", "report.html"):
        for path in out.glob(pattern):
            path.unlink()
    shutil.rmtree(out / WORK, ignore_errors=True)


def _remove_leavings(request: PackRequest) -> None:
    """Remove temporary files of runs that were killed."""
    for folder in (request.out, request.work, request.work / "plan"):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def ensure_plan(request: PackRequest) -> dict[str, Any]:
    """Return the summary of the plan, which is made where there is none."""
    path = request.work / "plan" / "plan.json"
    if not path.is_file():
        start = time.perf_counter()
        sources = request.sources()
        read = time.perf_counter() - start
        plan: Plan = make_plan(sources, request.settings)
        del sources
        save_plan(plan, path.parent)
        times = {"read annotations": read, "plan": time.perf_counter() - start - read}
        write_whole(request.work / "times.json", json.dumps(times).encode())
    return dict(json.loads(path.read_bytes()))


def _part_path(request: PackRequest, number: int) -> Path:
    return request.work / "plan" / f"part-{number:06d}.json"


Task = tuple[Path, Path, int, Sequence[str], PackSettings]
Engine = Callable[[Sequence[Task], int], Iterable[int]]


def run_here(tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """Pack shards in ``workers`` processes of this machine (0: in this one); yields pictures done, by shard.

    Raises:
        UserError: a process was killed from outside.
    """
    if workers == 0 or len(tasks) <= 1:
        yield from (pack_shard(*task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context) as pool:
        futures = [pool.submit(pack_shard, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a packing process was killed (out of memory?); go on with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_on_ray(tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """Pack shards on a Ray cluster: the one that ``RAY_ADDRESS`` names, or one of this machine.

    Every node has to see the pictures and the folder of shards under the same paths.

    Args:
        tasks: of :func:`~pbe.data.packing_task.pack_shard`.
        workers: most tasks at a time; 0 leaves that to Ray.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install ray") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    remote = ray.remote(max_retries=3)(pack_shard)
    waiting = list(reversed(tasks))
    pending: list[Any] = []
    while waiting or pending:
        while waiting and len(pending) < (workers or len(tasks)):
            pending.append(remote.remote(*waiting.pop()))
        done, pending = ray.wait(pending)
        yield from ray.get(done)


ENGINES: dict[str, Engine] = {"local": run_here, "ray": run_on_ray}


def _pack_missing(
    request: PackRequest,
    plan: dict[str, Any],
    part: tuple[int, int],
    run: Engine,
    workers: int,
    progress: Progress,
) -> None:
    """Pack the shards of this part that are not done yet."""
    ends = [0, *plan["shards"]]
    tasks: list[Task] = []
    for number in range(part[0], len(plan["shards"]), part[1]):
        if _part_path(request, number).is_file():
            progress(ends[number + 1] - ends[number])
        else:
            tasks.append((request.work / "plan", request.out, number, plan["labels"], request.settings))
    try:
        for pictures in run(tasks, workers):
            progress(pictures)
    except OSError as error:
        raise UserError(
            f"cannot write to '{request.out}': {error.strerror or error}; afterwards the same command goes on"
        ) from error


def collect(request: PackRequest, plan: dict[str, Any]) -> PackResult:
    """Add up the records of all shards."""
    tally = Tally(
        dropped_pictures=Counter(plan["dropped_pictures"]), dropped_boxes=Counter(plan["dropped_boxes"])
    )
    shards = []
    for number in range(len(plan["shards"])):
        part = json.loads(_part_path(request, number).read_bytes())
        tally.add(part["tally"])
        shards += [part["shard"]] if part["shard"] else []
    summary = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "fingerprint": request.fingerprint,
        "pictures": tally.pictures,
        "boxes": tally.boxes,
        "bytes": sum(shard["bytes"] for shard in shards),
        "labels": plan["labels"],
        "shards": shards,
    }
    times = request.work / "times.json"
    if times.is_file():
        for stage, seconds in json.loads(times.read_bytes()).items():
            tally.spend(stage, seconds)
    return PackResult(summary, tally, plan)


def pack(
    request: PackRequest,
    *,
    engine: str = "local",
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: Callable[[int], Progress] | None = None,
    finish: Callable[[PackResult], None] | None = None,
) -> PackResult | None:
    """Pack, or go on with packing.

    Args:
        request: what and where.
        engine: ``local`` or ``ray``.
        workers: processes; None is one a core, 0 packs in this process.
        part: (i, n): pack every n-th shard from the i-th on and leave the rest to others; the list of shards
            is written by the run without a part, (0, 1), which packs what is missing.
        overwrite: remove what an earlier packing left.
        progress: called with the number of pictures; what it returns is called with pictures done.
        finish: called with the result before the list of shards is written, to write the report.

    Returns:
        The result; None for a part, or where everything was done before.

    Raises:
        UserError: for anything that the user can mend; what is done stays.
    """
    request.settings.check()
    make_folder(request.out)
    whole = part == (0, 1)
    busy = f"another run is packing into '{request.out}'; wait for it or name another folder"
    with _lock(request.out, ".lock-plan", fcntl.LOCK_EX, busy):
        if _check_folder(request, overwrite):
            return None
        plan = ensure_plan(request)
    mode = fcntl.LOCK_EX if whole else fcntl.LOCK_SH
    with _lock(request.out, ".lock", mode | fcntl.LOCK_NB, busy):
        if whole:
            _remove_leavings(request)
        advance = progress(plan["shards"][-1] if whole else -1) if progress else lambda _: None
        count = workers if workers is not None else os.cpu_count() or 1
        _pack_missing(request, plan, part, ENGINES[engine], count, advance)
        if not whole:
            return None
        result = collect(request, plan)
        if not result.summary["shards"]:
            raise UserError(f"no picture is left to pack: {dict(result.tally.dropped_pictures)}")
        if finish:
            finish(result)
        write_whole(request.out / MANIFEST_NAME, json.dumps(result.summary, ensure_ascii=False).encode())
        shutil.rmtree(request.work)
        return result
