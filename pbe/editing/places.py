"""Telling a path from the name of a repository on the Hugging Face Hub. No torch here."""

from __future__ import annotations

import re
from pathlib import Path

from pbe.editing.problems import EditValueError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def require_place(path_or_hub_id: str | Path, option: str = "") -> Path | None:
    """Return a path that exists; None for what may be a repository's name, ``owner/name``.

    A path that exists comes before a repository of the same name.

    Args:
        path_or_hub_id: what was given.
        option: of a command line, named by the error.

    Raises:
        EditValueError: it can be neither.
    """
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    if path.exists():
        return path
    if isinstance(path_or_hub_id, Path) or not HUB_ID.fullmatch(name):
        kinds = "a model's folder, a checkpoint file or a Hub id (owner/name)"
        raise EditValueError(f"{option and option + ' '}'{name}' does not exist; give {kinds}")
    return None
