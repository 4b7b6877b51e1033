"""How long edits took to make, over all the runs that made them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pbe.editing.batch.records import write_json

TIMES = "seconds.json"


@contextmanager
def timed(folder: Path, *, note: bool = True) -> Iterator[None]:
    """Add the wall time spent inside to the folder's, if pictures were made in it, also when it fails.

    A run that is killed outright adds nothing.

    Args:
        folder: of edits; its time stands in ``seconds.json`` beside it.
        note: write it; False in processes that another one speaks for.
    """
    started, before = time.perf_counter(), _pictures(folder)
    try:
        yield
    finally:
        if note and _pictures(folder) != before:
            times = read_times(folder.parent)
            earlier = times.get(folder.name, 0.0) if before else 0.0
            spent = earlier + time.perf_counter() - started
            write_json(folder.parent / TIMES, times | {folder.name: round(spent, 2)})


def read_times(folder: Path) -> dict[str, float]:
    """Return the seconds noted by name of folder; none where there is no such note."""
    try:
        content = json.loads((folder / TIMES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    times = content if isinstance(content, dict) else {}
    return {name: float(spent) for name, spent in times.items() if isinstance(spent, int | float)}


def _pictures(folder: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_mtime_ns) for path in folder.glob("*.png")}
