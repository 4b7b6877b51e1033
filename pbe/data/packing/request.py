"""What is to be packed, and the folder it is packed into: what it holds, and how a run takes it over.

A folder is taken over once there is a plan of something to pack: ``.packing/`` then holds the plan, and last
``request.json``, which says whose plan it is. What fails before leaves the folder as it was.
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

from pbe.data.packing.plan import SUMMARY, PackSettings, Plan, save_plan
from pbe.data.packing.records import read_json, read_summary, write_whole
from pbe.data.shards.format import MANIFEST_NAME
from pbe.data.sources.annotations import Annotations
from pbe.errors import UserError
from pbe.files import lock

PLAN_LOCK, PACK_LOCK = ".lock-plan", ".lock"
PLAN_VERSION = 2
OUR_SHARD = re.compile(r"shard-\d{6}\.tar")
# What packing writes: the list of shards is removed first.
OUTPUTS = (MANIFEST_NAME, "shard-*.tar", "shard-*.index.npz", "report.json", "report.html")


class State(Enum):
    """What a folder holds of a request."""

    NEW = "nothing"
    PLANNED = "a plan, and what was packed of it"
    COMPLETE = "everything"


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

    @property
    def busy(self) -> str:
        """The complaint that another run holds the folder."""
        return f"another run is packing into '{self.out}'; wait for it or name another folder"

    def state(self, overwrite: bool = False) -> State:
        """Return what the folder holds; what is not of this request is an error. Nothing is changed.

        Args:
            overwrite: shards of other requests, as long as they were packed here, count as nothing.
        """
        others = f"'{self.out}' holds shards that were not packed here; name another folder"
        tars = [path.name for path in self.out.glob("*.tar")]
        if overwrite:
            if not all(OUR_SHARD.fullmatch(name) for name in tars):
                raise UserError(others)
            return State.NEW
        summary = read_summary(self.out)
        if summary is not None:
            if summary.get("fingerprint") == self.fingerprint:
                return State.COMPLETE
            raise UserError(
                f"'{self.out}' holds shards of other sources or settings; name another folder or --overwrite"
            )
        marker = self.work / "request.json"
        if not marker.is_file():
            if tars:
                raise UserError(others)
            return State.NEW
        begun = read_json(marker)
        if begun.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"'{self.out}' holds a half-done packing of other sources or settings; "
                "start it with the same ones, name another folder or use --overwrite"
            )
        planned = begun.get("version") == PLAN_VERSION and (self.plan / "plan.json").is_file()
        return State.PLANNED if planned else State.NEW

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Keep other runs from planning; where planning fails, remove what this made of the folder."""
        missing = [path for path in (self.out, *self.out.parents) if not path.exists()]
        try:
            with lock(self.out / PLAN_LOCK):
                yield
        except BaseException:
            with contextlib.suppress(OSError):  # what holds something by now stays
                for path in missing:
                    path.rmdir()
            raise

    def packing(self, *, shared: bool = False) -> contextlib.AbstractContextManager[object]:
        """Keep other runs from packing, or only those that pack everything; a UserError where one does."""
        return lock(self.out / PACK_LOCK, shared=shared, keep=True, busy=self.busy)

    def save_plan(self, plan: Plan, times: dict[str, float], overwrite: bool) -> None:
        """Write the plan and say whose it is, and first remove what packing wrote, where that is wanted."""
        marker = {"fingerprint": self.fingerprint, "version": PLAN_VERSION}
        with self.packing():
            try:
                for path in (path for pattern in OUTPUTS for path in self.out.glob(pattern) if overwrite):
                    path.unlink()
                shutil.rmtree(self.work, ignore_errors=True)
                save_plan(plan, self.plan)
                write_whole(self.work / "times.json", json.dumps(times))
                write_whole(self.work / "request.json", json.dumps(marker))
            except OSError as error:
                raise UserError(f"cannot write to '{self.out}': {error.strerror or error}") from error

    def read_plan(self) -> dict[str, Any]:
        """Return the summary of the plan that the folder holds."""
        path = self.plan / "plan.json"
        plan = read_json(path)
        whole = all(isinstance(plan.get(name), kind) for name, kind in SUMMARY.items())
        if not whole or not all(type(end) is int and end > 0 for end in plan["shards"]):
            raise UserError(f"'{path}' is damaged; start anew with --overwrite")
        return plan

    def remove_temporary_files(self) -> None:
        """Remove what runs that were killed left."""
        for folder in (self.out, self.work, self.plan):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)
