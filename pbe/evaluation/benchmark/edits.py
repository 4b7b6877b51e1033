"""Folders of edits: whose edits they are, which of them can be used, and how long they took to make."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pbe.editing.batch.records import model_digests, write_json
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder, ReadOnDemand
from pbe.evaluation.metrics.sets import SUFFIXES, UNREADABLE, read_image
from pbe.files import make_folder
from pbe.models.adapters import adapters_of

SETTINGS, FORMAT = "settings.json", "pbe-edits-1"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"
PNG_DEPTH = 24  # where a PNG's header has its bits a channel
EXACT_MODES = ("RGB", "L", "P")  # Pillow's, of images that become 8-bit RGB without loss
MISSING, DAMAGED = "missing", "damaged"
NOT_RGB, OTHER_SIZE = "not an 8-bit RGB image", "of another size than its case"
MODELS_OWN = "the model's"
# What edits were made with where their note is older than the setting.
BEFORE: dict[str, Any] = {"preserve_background": True, "conventions": MODELS_OWN, "raw_weights": False}
TIMES = "seconds.json"


def is_whole(path: Path, size: tuple[int, int]) -> bool:
    """Tell whether a PNG of that height and width is there, from its start to its end."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), 2)
            if file.read() != PNG_END:
                return False
        with Image.open(path) as image:
            return (image.height, image.width) == size
    except UNREADABLE:
        return False


def find_edit_fault(path: Path, size: tuple[int, int]) -> str:
    """Return why the header of an edit's file says that it cannot be scored; empty if it does not.

    Greys and palettes are taken, since they become RGB without loss; transparency and more than eight bits
    would not. ``size`` is the height and width of the case.
    """
    try:
        with path.open("rb") as file:
            start = file.read(PNG_DEPTH + 1)
        with Image.open(path) as image:
            mode, info, found = image.mode, image.info, (image.height, image.width)
    except UNREADABLE:
        return DAMAGED
    deep = start.startswith(PNG_START) and start[PNG_DEPTH] > 8  # which Pillow would cut to eight bits
    if mode not in EXACT_MODES or "transparency" in info or deep:
        return NOT_RGB
    return "" if found == size else OTHER_SIZE


def model_identity(model: Path | PaintByExample) -> dict[str, str]:
    """Return hashes that name a model: of its files, or of a pipeline's weights."""
    if isinstance(model, PaintByExample):
        digest = hashlib.sha256()
        for name, tensor in sorted(model.model.state_dict().items()):
            content = tensor.detach().cpu().contiguous().flatten()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(content.view(torch.uint8).numpy().tobytes())
        for layer, adapter in adapters_of(model.model):  # how strong they are is no weight
            digest.update(f"{layer} {adapter.scale}\n".encode())
        return {"weights": digest.hexdigest()}
    if not model.exists():
        raise UserError(f"the model '{model}' does not exist")
    return model_digests(model)


def claim_folder(
    folder: Path, model: dict[str, str], benchmark: BenchmarkFolder, settings: dict[str, Any]
) -> None:
    """Note in a folder what its edits are made of, or check that it is the same as before.

    A note without images, as a start that failed leaves it, is written anew.
    """
    wanted = {"format": FORMAT, "model": model, "benchmark": benchmark.sha256, "settings": settings}
    path = make_folder(folder) / SETTINGS
    noted = read_settings(folder)
    if path.exists() and not noted:
        raise UserError(f"'{path}' was not written by this command; name another folder for new edits")
    edited = any(each.suffix.lower() in SUFFIXES for each in folder.iterdir())
    if edited and not noted:
        raise UserError(f"'{folder}' holds images but no {SETTINGS}; name another folder for new edits")
    differing = list(_differences(noted, wanted))
    if edited and differing:
        raise UserError(
            f"'{folder}' holds other edits ({'; '.join(differing)}): name another folder, or empty it"
        )
    if differing:
        write_json(path, wanted)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what a folder's edits are made of; empty where no note of :func:`claim_folder` says it.

    Folders of other systems may hold a ``settings.json`` of their own, which is none of ours.
    """
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(content, dict) and content.get("format") == FORMAT
    return content if ours and isinstance(content.get("settings"), dict) else {}


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    if found.get("model") != wanted["model"]:
        yield "of another model"
    if found.get("benchmark") != wanted["benchmark"]:
        yield "of another benchmark"
    before = BEFORE | found.get("settings", {})
    for name, value in wanted["settings"].items():
        if before.get(name) != value:
            yield f"{name} was {before.get(name)}, not {value}"


class EditFolder(ReadOnDemand[np.ndarray | None]):
    """The edits of a folder, one for each case of a benchmark and read when asked for.

    Args:
        folder: of any system's edits, ``<id>.png``; ``.jpg``, ``.webp`` and ids without leading zeros too.
        benchmark: whose cases they are of.

    Attributes:
        extra: names of images that belong to no case.
        faults: why edits that are there cannot be used, by id, as far as they were read.
    """

    def __init__(self, folder: Path, benchmark: BenchmarkFolder) -> None:
        self.folder, self.benchmark = folder, benchmark
        self.extra: list[str] = []
        self.faults: dict[str, str] = {}
        if not folder.is_dir():
            raise UserError(f"'{folder}' is not a folder of edits")
        self._files: dict[int, Path] = {}
        numbers = {int(each): position for position, each in enumerate(benchmark.ids)}
        for path in sorted(each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES):
            number = int(path.stem) if path.stem.isdecimal() else -1
            position = numbers.get(number)
            if position is None:
                self.extra += [path.name] if number not in benchmark.numbers else []
            elif position in self._files:
                raise UserError(f"'{folder}' has two edits of one case, such as {path.name}")
            else:
                self._files[position] = path
        if not self._files:
            inner = [path for path in sorted(folder.glob("edits/*")) if path.is_dir()]
            hint = f"did you mean '{inner[0]}'?" if inner else f"name them like {benchmark.ids[0]}.png"
            raise UserError(f"'{folder}' holds no edit of '{benchmark.folder}': {hint}")

    @property
    def missing(self) -> list[str]:
        """Ids of the cases that have no file."""
        return [each for position, each in enumerate(self.benchmark.ids) if position not in self._files]

    @property
    def left_out(self) -> dict[str, str]:
        """Why edits cannot be used, by id and in the order of the benchmark; complete when all were read."""
        faults = self.faults | dict.fromkeys(self.missing, MISSING)
        return {each: faults[each] for each in self.benchmark.ids if each in faults}

    def why_not(self, position: int) -> str:
        """Return why there was no edit at a position when it was read."""
        return self.faults.get(self.benchmark.ids[position], MISSING)

    def __len__(self) -> int:
        return len(self.benchmark)

    def read(self, index: int) -> np.ndarray | None:
        """Read an edit, uint8 RGB ``h w 3``: None where it is missing or of no use."""
        case = self.benchmark.ids[index]
        path = self._files.get(index % len(self))
        if path is None:
            return None
        fault = find_edit_fault(path, self.benchmark.sizes[index])
        if not fault:
            try:
                return read_image(path)
            except UserError:
                fault = DAMAGED
        self.faults[case] = fault
        return None


@contextmanager
def timed(folder: Path, *, note: bool = True) -> Iterator[None]:
    """Add the wall time spent inside to the folder's, if images were made in it, also when it fails.

    It stands in ``seconds.json`` beside the folder. A run that is killed outright adds nothing, nor does one
    with ``note`` off, in processes that another one speaks for.
    """
    started, before = time.perf_counter(), _images(folder)
    try:
        yield
    finally:
        if note and _images(folder) != before:
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


def _images(folder: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_mtime_ns) for path in folder.glob("*.png")}
