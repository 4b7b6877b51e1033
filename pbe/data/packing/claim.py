"""The folder that is packed into: locked, looked at, and claimed once there is a plan of something to pack.

A claim is ``.packing/`` in the folder: the plan, and last ``request.json``, which says whose plan it is. What
fails before leaves the folder as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pbe.data.packing.index import read_json, read_summary, write_whole
from pbe.data.packing.plan import SUMMARY, PackSettings, Plan, save_plan
from pbe.data.shards.index import MANIFEST_NAME
from pbe.data.sources.annotations import Annotations
from pbe.errors import UserError
from pbe.files import lock

WORK, PLAN_LOCK, PACK_LOCK = ".packing", ".lock-plan", ".lock"
PLAN_VERSION = 2
OUR_SHARD = re.compile(r"shard-\d{6}\.tar")
Sources = Callable[[], Sequence[Annotations]]


class State(Enum):
    """What a folder holds of a request."""

    NEW = "nothing"
    PLANNED = "a plan, and what was packed of it"
    COMPLETE = "everything"


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

    @property
    def plan(self) -> Path:
        """Folder of the plan."""
        return self.work / "plan"


@contextlib.contextmanager
def reserved(request: PackRequest) -> Iterator[None]:
    """Keep other runs from planning; where planning fails, remove what this made of the folder."""
    folder = request.out
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with lock(folder / PLAN_LOCK):
            yield
    except BaseException:
        with contextlib.suppress(OSError):  # what holds something by now stays
            for path in missing:
                path.rmdir()
        raise


def look(request: PackRequest, overwrite: bool) -> State:
    """Return what the folder holds; nothing is changed."""
    others = "that were not packed here; name another folder"
    tars = [path.name for path in request.out.glob("*.tar")]
    if overwrite:
        if not all(OUR_SHARD.fullmatch(name) for name in tars):
            raise UserError(f"'{request.out}' holds shards {others}")
        return State.NEW
    summary = read_summary(request.out)
    if summary is not None:
        if summary.get("fingerprint") == request.fingerprint:
            return State.COMPLETE
        raise UserError(
            f"'{request.out}' holds shards of other sources or settings; name another folder or --overwrite"
        )
    marker = request.work / "request.json"
    if not marker.is_file():
        if tars:
            raise UserError(f"'{request.out}' holds shards {others}")
        return State.NEW
    claim = read_json(marker)
    if claim.get("fingerprint") != request.fingerprint:
        raise UserError(
            f"'{request.out}' holds a half-done packing of other sources or settings; "
            "start it with the same ones, name another folder or use --overwrite"
        )
    planned = claim.get("version") == PLAN_VERSION and (request.plan / "plan.json").is_file()
    return State.PLANNED if planned else State.NEW


def claim_folder(request: PackRequest, plan: Plan, times: dict[str, float], overwrite: bool) -> None:
    """Write the plan and the claim, and first remove what is to be overwritten."""
    marker = {"fingerprint": request.fingerprint, "version": PLAN_VERSION}
    with lock(request.out / PACK_LOCK, keep=True, busy=busy(request)):
        try:
            if overwrite:
                _clear(request.out)
            shutil.rmtree(request.work, ignore_errors=True)
            save_plan(plan, request.plan)
            write_whole(request.work / "times.json", json.dumps(times).encode())
            write_whole(request.work / "request.json", json.dumps(marker).encode())
        except OSError as error:
            raise UserError(f"cannot write to '{request.out}': {error.strerror or error}") from error


def busy(request: PackRequest) -> str:
    """Return the complaint that another run holds the folder."""
    return f"another run is packing into '{request.out}'; wait for it or name another folder"


def _clear(out: Path) -> None:
    """Remove what packing wrote, the list of shards first, and nothing else."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for pattern in ("shard-*.tar", "shard-*.index.npz", "report.json", "report.html"):
        for path in out.glob(pattern):
            path.unlink()


def remove_leavings(request: PackRequest) -> None:
    """Remove temporary files of runs that were killed."""
    for folder in (request.out, request.work, request.plan):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def read_plan(request: PackRequest) -> dict[str, Any]:
    """Return the summary of the plan that a claim holds."""
    path = request.plan / "plan.json"
    plan = read_json(path)
    whole = all(isinstance(plan.get(name), kind) for name, kind in SUMMARY.items())
    if not whole or not all(type(end) is int and end > 0 for end in plan["shards"]):
        raise UserError(f"'{path}' is damaged; start anew with --overwrite")
    return plan
