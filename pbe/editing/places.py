"""Telling a path from the name of a repository on the Hugging Face Hub. No torch here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pbe.editing.problems import EditValueError
from pbe.files import expand_home
from pbe.resources import find_model

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def require_place(path_or_hub_id: str | Path, option: str = "") -> Path | None:
    """Return a path that exists; None for what may be a repository's name, ``owner/name``.

    A path that exists comes before a repository of the same name; a leading ``~`` is the home folder.

    Args:
        path_or_hub_id: what was given.
        option: of a command line, named by the error.

    Raises:
        EditValueError: it can be neither.
    """
    name = find_model(expand_home(str(path_or_hub_id)))
    if os.path.exists(name):  # of a Path, exists() raises for names that no system can have
        return Path(name)
    if isinstance(path_or_hub_id, Path) or not HUB_ID.fullmatch(name):
        kinds = "a model's folder, a checkpoint file or a Hub id (owner/name)"
        raise EditValueError(f"{option and option + ' '}'{name}' does not exist; give {kinds}")
    return None
