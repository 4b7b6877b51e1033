"""Files that ship with the project: configurations, the toy world and its model, examples.

A clone has them at its top (``configs/``, ``data/``), an installed package in ``pbe/_resources``.
"""

from __future__ import annotations

import os
from pathlib import Path

TOY_MODEL = "data/toy/model"
MODELS = {"toy": TOY_MODEL, "toy-fast": "data/toy/fast"}


def packaged(name: str) -> Path:
    """Return where a file or folder that ships lies.

    Args:
        name: its path in the repository, such as ``data/toy/toy_world.zip``.
    """
    package = Path(__file__).resolve().parent  # importlib.resources would take a fifth of --help's time
    installed = package / "_resources"
    return (installed if installed.is_dir() else package.parent) / name


def config_names() -> list[str]:
    """Return the names that :func:`find_config` knows: ``toy``, ``debug/fast_dev`` and so on."""
    folder = packaged("configs")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Return the configuration file of a name such as ``toy``; any other text is the path of a file.

    A file of that name comes first.
    """
    if os.path.isfile(name) or str(name) not in config_names():
        return Path(name)
    return packaged(f"configs/{name}.yaml")


def find_model(name: str) -> str:
    """Return the folder of a model that ships: ``toy``, or ``toy-fast``, its student of four steps.

    Their paths in the repository do, too. Any other text comes back as it is, and a file or folder of that
    name comes first.
    """
    place = MODELS.get(name, name)
    return str(packaged(place)) if place in MODELS.values() and not os.path.exists(name) else name


def model_name(place: Path) -> str:
    """Return the name of a model that ships, and of any other its path."""
    ships = (name for name, path in MODELS.items() if place.resolve() == packaged(path).resolve())
    return next(ships, str(place))
