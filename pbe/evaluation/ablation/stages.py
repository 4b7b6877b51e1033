"""A stage of an ablation: a piece of work with a folder of its own and a fingerprint of all it depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbe.files import write_output

DONE = "done.json"
MARK = {"seconds": int | float, "units": int | float, "rate": str, "resumed": bool}  # what estimates read


@dataclass(frozen=True)
class Stage:
    """Work that one process does, once.

    Attributes:
        name: shown to people.
        kind: of the work: ``scenes``, ``benchmark``, ``cache``, ``training``, ``edits`` or ``scores``.
        fingerprint: of everything that shapes the result; equal ones are the same stage.
        folder: what it makes, its log and its mark.
        units: how much work it is.
        rate: key of the seconds that a unit takes.
        needs: fingerprints of the stages that must be done before.
        job: what the process is told, ready for JSON.
    """

    name: str
    kind: str
    fingerprint: str
    folder: Path
    units: float
    rate: str
    needs: tuple[str, ...] = ()
    job: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.folder / "log.txt"

    def mark(self) -> dict[str, Any] | None:
        """Return the mark of a finished stage, None while it is not finished."""
        try:
            content = json.loads((self.folder / DONE).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("fingerprint") != self.fingerprint:
            return None
        return content if all(isinstance(content.get(key), kind) for key, kind in MARK.items()) else None

    def finish(self, seconds: float, resumed: bool) -> None:
        """Mark the stage as finished; the mark appears whole or not at all."""
        content = {
            "name": self.name,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "seconds": round(seconds, 2),
            "units": self.units,
            "rate": self.rate,
            "resumed": resumed,
        }
        write_json(self.folder / DONE, content)


def fingerprint_of(*parts: Any) -> str:
    """Return a hash of JSON-ready values, 24 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def write_json(path: Path, content: Any) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_output(path, json.dumps(content, indent=2) + "\n")
