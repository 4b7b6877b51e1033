"""``pbe doctor``: what this installation has and lacks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator

from pbe import __version__
from pbe.resources import MODELS, packaged

EXTRA = re.compile(r"extra == ['\"](\w+)['\"]")
MAIN = ("torch", "pytorch-lightning", "numpy", "open_clip_torch", "safetensors")


def doctor() -> int:
    """Report versions, devices and memory, and for each missing extra the command that installs it.

    The exit status is 1 where a package that everything needs is missing.
    """
    print(f"pbe {__version__}, Python {platform.python_version()} ({sys.executable}), {platform.platform()}")
    for name in MAIN:
        print(f"  {name:20} {_version(name) or 'missing'}")
    for line in (*_devices(), *_memory(), *_resources()):
        print(line)
    missing = _missing()
    for extra, requirements in missing.items():
        what = f"extra '{extra}'" if extra else "needed by everything"
        quoted = " ".join(f'"{each}"' for each in requirements)
        print(f"{what}: " + (f"{sys.executable} -m pip install {quoted}" if quoted else "complete"))
    return 1 if missing[""] else 0


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch
    except ImportError as error:
        yield f"devices: torch cannot be imported ({error}); {cores} CPU cores"
        return
    yield f"CPU: {cores} cores for this process, {torch.get_num_threads()} threads of PyTorch"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield f"cuda:{index}: {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if torch.backends.mps.is_available():
        yield "mps: available"
    elif not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        yield f"no GPU that PyTorch can use (it {built})"


def _memory() -> Iterator[str]:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield f"memory: {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    yield f"disk: {shutil.disk_usage('.').free / 2**30:.1f} GiB free in {os.getcwd()}"


def _resources() -> Iterator[str]:
    for name in ("configs", "data/toy/toy_world.zip", *MODELS.values()):
        path = packaged(name)
        yield f"{name}: {path if path.exists() else f'missing at {path}'}"


def _missing() -> dict[str, list[str]]:
    """Return the requirements that are not installed: of the package ('') and of each of its extras."""
    try:
        package = importlib.metadata.metadata("pbe")
    except importlib.metadata.PackageNotFoundError:  # on the path only
        return {"": [f"-e{packaged('.')}"]}
    missing: dict[str, list[str]] = {"": [], **{each: [] for each in package.get_all("Provides-Extra", [])}}
    for line in package.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        name = re.split(r"[\s<>=!~(\[]", requirement.strip(), maxsplit=1)[0]
        extra = EXTRA.search(marker)
        if name != "pbe" and not _version(name):
            missing[extra[1] if extra else ""].append(requirement.strip())
    return missing
