"""Packing annotated images into shards: on all cores or a cluster, resumable, the same bytes always.

A folder is taken over once there is a plan of something to pack: ``.packing/`` then holds the plan, and last
``request.json``, which says whose plan it is, and later a record of every shard that is done. What fails
before leaves the folder as it was. A run that was killed leaves whole shards and such records; started again,
it packs what is not done.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pbe.cluster import RayCluster
from pbe.data.packing.plan import OPTIONS, SUMMARY, PackSettings, Plan, make_plan, save_plan
from pbe.data.packing.worker import Tally, pack_shard, part_path
from pbe.data.shards.format import MANIFEST_FORMAT, MANIFEST_NAME, MANIFEST_VERSION, PACK_AGAIN, load_manifest
from pbe.data.sources.annotations import Annotations
from pbe.errors import UserError
from pbe.files import atomic_write, lock, new_folder

PLAN_LOCK, PACK_LOCK = ".lock-plan", ".lock"
PLAN_VERSION = 2
OUR_SHARD = re.compile(r"shard-\d{6}\.tar")
# What packing writes: the list of shards is removed first.
OUTPUTS = (MANIFEST_NAME, "shard-*.tar", "shard-*.index.npz", "report.json", "report.html")
ANEW = "start anew with --overwrite"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file that packing keeps for itself."""
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        problem = "no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
    raise UserError(f"'{path}' is damaged ({problem}); {ANEW}")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return what ``shards.json`` of a folder holds, or None where there is none."""
    path = folder / MANIFEST_NAME
    try:
        return load_manifest(path.read_bytes(), path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}); {PACK_AGAIN}") from error


@dataclass(frozen=True)
class PackRequest:
    """What is to be packed, and where."""

    sources: Callable[[], Sequence[Annotations]]  # called only where there is no plan yet
    description: Sequence[str]  # of the sources; with the settings it tells one request from another
    settings: PackSettings
    out: Path  # folder of the shards

    @property
    def fingerprint(self) -> str:
        """Hash of the description and the settings."""
        request = json.dumps([list(self.description), self.settings.to_dict()], sort_keys=True)
        return hashlib.blake2b(request.encode(), digest_size=16).hexdigest()

    @property
    def work(self) -> Path:
        """Folder of the plan and of the records."""
        return self.out / ".packing"

    @property
    def plan(self) -> Path:
        """Folder of the plan."""
        return self.work / "plan"

    def state(self, overwrite: bool = False) -> Literal["new", "planned", "complete"]:
        """Return what the folder holds of the request; what is of another is an error. Nothing is changed.

        With ``overwrite``, shards of other requests count as nothing, as long as they were packed here.
        """
        summary = None if overwrite else read_summary(self.out)
        if summary is not None:
            if summary.get("fingerprint") == self.fingerprint:
                return "complete"
            raise UserError(
                f"'{self.out}' holds shards of other sources or settings; name another folder or --overwrite"
            )
        marker = self.work / "request.json"
        if not overwrite and marker.is_file():
            begun = read_json(marker)
            if begun.get("fingerprint") != self.fingerprint:
                raise UserError(
                    f"'{self.out}' holds an unfinished packing of other sources or settings; "
                    "continue it with those, name another folder or use --overwrite"
                )
            planned = begun.get("version") == PLAN_VERSION and (self.plan / "plan.json").is_file()
            return "planned" if planned else "new"
        for path in self.out.glob("*.tar"):
            if not (overwrite and OUR_SHARD.fullmatch(path.name)):
                raise UserError(f"'{self.out}' holds shards that were not packed here; name another folder")
        return "new"

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Keep other runs from planning; where planning fails, remove what this made of the folder."""
        with new_folder(self.out), lock(self.out / PLAN_LOCK):
            yield

    def packing(self, *, shared: bool = False) -> AbstractContextManager[object]:
        """Keep other runs from packing, or only those that pack everything; a UserError where one does."""
        busy = f"another run is packing into '{self.out}'; wait for it or name another folder"
        return lock(self.out / PACK_LOCK, shared=shared, keep=True, busy=busy)

    def save_plan(self, plan: Plan, times: dict[str, float], overwrite: bool) -> None:
        """Write the plan and say whose it is, and first remove what packing wrote, where that is wanted."""
        marker = {"fingerprint": self.fingerprint, "version": PLAN_VERSION}
        with self.packing():
            try:
                for path in (path for pattern in OUTPUTS for path in self.out.glob(pattern) if overwrite):
                    path.unlink()
                shutil.rmtree(self.work, ignore_errors=True)
                save_plan(plan, self.plan)
                atomic_write(self.work / "times.json", json.dumps(times), sync=True)
                atomic_write(self.work / "request.json", json.dumps(marker), sync=True)
            except OSError as error:
                raise UserError(f"cannot write to '{self.out}': {error.strerror or error}") from error

    def read_plan(self) -> dict[str, Any]:
        """Return the summary of the plan that the folder holds."""
        path = self.plan / "plan.json"
        plan = read_json(path)
        whole = all(isinstance(plan.get(name), kind) for name, kind in SUMMARY.items())
        if not whole or not all(type(end) is int and end > 0 for end in plan["shards"]):
            raise UserError(f"'{path}' is damaged; {ANEW}")
        return plan


@dataclass(frozen=True)
class PackResult:
    """What was packed: the summary in ``shards.json``, the counts of all shards, and of the plan."""

    summary: dict[str, Any]
    tally: Tally
    plan: dict[str, Any]


Progress = Callable[[int], object]
Finish = Callable[[PackRequest, PackResult], None]
Task = tuple[Path, Path, int, Sequence[str], PackSettings]
Engine = Callable[[Sequence[Task], int], Iterable[int]]


def plan_requests(
    requests: Sequence[PackRequest], *, overwrite: bool = False, finish: Finish | None = None
) -> None:
    """Plan requests over the same sources and take over their folders: all of them, or none.

    With ``overwrite``, what an earlier packing left is removed once there is a plan. ``finish`` writes the
    report where nothing is left to pack.
    """
    with ExitStack() as stack:
        for request in requests:
            request.settings.check()
            stack.enter_context(request.planning())
        states = [request.state(overwrite) for request in requests]
        new = [request for request, state in zip(requests, states, strict=True) if state == "new"]
        start = time.perf_counter()
        sources = new[0].sources() if new else []
        read = time.perf_counter()
        plans = [make_plan(sources, request.settings) for request in new]
        del sources
        for request, plan in zip(new, plans, strict=True):
            if not plan.shards:
                _nothing_left(request, _collect(request, plan.summary()), finish)
        times = {"read annotations": read - start, "plan": time.perf_counter() - read}
        for request, plan in zip(new, plans, strict=True):
            request.save_plan(plan, times, overwrite)


def _nothing_left(request: PackRequest, result: PackResult, finish: Finish | None) -> NoReturn:
    """Say why, and leave a report, but not in the place of a finished set's."""
    tally = result.tally
    why = [
        f"{count} {one if count == 1 else many} {reason}"
        + (f" ({OPTIONS[reason]})" if reason in OPTIONS else "")
        for one, many, reasons in (
            ("image", "images", tally.dropped_pictures),
            ("box", "boxes", tally.dropped_boxes),
        )
        for reason, count in (+reasons).most_common()
    ]
    line = f"no image is left to pack into '{request.out}' ({'; '.join(why) or 'none was found'})"
    if finish and not (request.out / MANIFEST_NAME).exists():
        finish(request, result)
        line += f"; the report with examples: '{request.out / 'report.html'}'"
    raise UserError(line)


def run_here(tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """Pack shards in ``workers`` processes of this machine (0: in this one); yields images done, by shard."""
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
    """Pack shards on a Ray cluster, at most ``workers`` at a time; 0 leaves that to Ray."""
    return RayCluster().completed(pack_shard, tasks, most=workers)


ENGINES: dict[str, Engine] = {"local": run_here, "ray": run_on_ray}


def _collect(request: PackRequest, plan: dict[str, Any]) -> PackResult:
    """Add up the records of all shards."""
    tally = Tally(
        dropped_pictures=Counter(plan["dropped_pictures"]),
        dropped_boxes=Counter(plan["dropped_boxes"]),
        examples=dict(plan["examples"]),
    )
    shards = []
    times = request.work / "times.json"
    paths = [part_path(request.plan, number) for number in range(len(plan["shards"]))]
    for path in [*paths, times] if times.is_file() else paths:
        record = read_json(path)
        try:
            if path == times:
                tally.add_seconds(record)
            else:
                tally.add(record["tally"])
                shards += [record["shard"]] if record["shard"] else []
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"'{path}' is damaged; {ANEW}") from error
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
    return PackResult(summary, tally, plan)


def pack_all(
    requests: Sequence[PackRequest],
    *,
    engine: str = "local",
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: Callable[[int], Progress] | None = None,
    finish: Finish | None = None,
) -> list[PackResult | None]:
    """Plan some requests over the same sources, then pack one after another, or resume packing.

    What is done stays where this ends with an error.

    Args:
        requests: what and where; one, or the two sides of a split.
        engine: ``local`` or ``ray``.
        workers: processes; None is one a core, 0 packs in this process.
        part: (i, n): pack every n-th shard from the i-th on and leave the rest to others; the list of shards
            is written by the run without a part, (0, 1), which packs what is missing.
        overwrite: remove what an earlier packing left.
        progress: called with the number of images; what it returns is called with images done.
        finish: called with request and result before the list of shards is written, to write the report.

    Returns:
        The results; None for a part, or where everything was done before.
    """
    whole = part == (0, 1)
    if overwrite and not whole:
        raise UserError("--overwrite goes without --part: each part would remove what the others have packed")
    plan_requests(requests, overwrite=overwrite, finish=finish)
    count = workers if workers is not None else os.cpu_count() or 1
    results: list[PackResult | None] = []
    for request in requests:
        with request.packing(shared=not whole):
            if request.state() == "complete":
                results.append(None)
                continue
            plan = request.read_plan()
            if whole:  # what runs that were killed left
                for folder in (request.out, request.work, request.plan):
                    for path in folder.glob(".*.tmp"):
                        path.unlink(missing_ok=True)
            advance = progress(plan["shards"][-1] if whole else -1) if progress else lambda _: None
            _pack_missing(request, plan, part, lambda tasks: ENGINES[engine](tasks, count), advance)
            results.append(_complete(request, plan, finish) if whole else None)
    return results


def _pack_missing(
    request: PackRequest,
    plan: dict[str, Any],
    part: tuple[int, int],
    run: Callable[[Sequence[Task]], Iterable[int]],
    progress: Progress,
) -> None:
    """Pack the shards of this part that are not done yet."""
    ends = [0, *plan["shards"]]
    tasks: list[Task] = []
    for number in range(part[0], len(plan["shards"]), part[1]):
        if part_path(request.plan, number).is_file():
            progress(ends[number + 1] - ends[number])
        else:
            tasks.append((request.plan, request.out, number, plan["labels"], request.settings))
    try:
        for images in run(tasks):
            progress(images)
    except OSError as error:
        raise UserError(
            f"cannot write to '{request.out}': {error.strerror or error}; afterwards the same command resumes"
        ) from error


def _complete(request: PackRequest, plan: dict[str, Any], finish: Finish | None) -> PackResult:
    """Write report and list of a set all of whose shards are packed."""
    result = _collect(request, plan)
    if not result.summary["shards"]:
        shutil.rmtree(request.work)
        _nothing_left(request, result, finish)
    if finish:
        finish(request, result)
    atomic_write(request.out / MANIFEST_NAME, json.dumps(result.summary, ensure_ascii=False), sync=True)
    shutil.rmtree(request.work)
    return result
