"""Files that ship with the project: configurations, the toy world and its model, examples.

A clone has them at its top (``configs/``, ``data/``), an installed package in ``pbe/_resources``.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

MODELS = {"toy": "data/toy/model"}  # by the name that stands for a path


def resource(name: str) -> Path:
    """Return where a file or folder that ships lies.

    Args:
        name: its path in the repository, such as ``data/toy/toy_world.zip``.
    """
    package = Path(str(files("pbe")))
    installed = package / "_resources"
    return (installed if installed.is_dir() else package.parent) / name


def config_names() -> list[str]:
    """Return the names that :func:`find_config` knows: ``toy``, ``debug/fast_dev`` and so on."""
    folder = resource("configs")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Return the configuration file of a name such as ``toy``; any other text is the path of a file.

    A file or folder of that name comes first.
    """
    if not Path(name).exists() and Path(name).suffix == "":
        packaged = resource(f"configs/{name}.yaml")
        if not Path(name).is_absolute() and packaged.is_file():
            return packaged
    return Path(name)


def find_model(name: str) -> str:
    """Return the folder of a model that ships, for its name; any other text as it is.

    A file or folder of that name comes first.
    """
    return str(resource(MODELS[name])) if name in MODELS and not Path(name).exists() else name
