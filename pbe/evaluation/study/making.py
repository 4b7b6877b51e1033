"""A human study as one static page: edits of several systems side by side, blinded, to be ranked.

The form is that of the paper's study (30 groups, ranks 1 to 5 for quality and for consistency). The page
knows images by opaque names only; ``key.json``, which whoever runs the study keeps, says whose they are. It
lies outside the folder to publish, and holds the random salt that the names are hashes with: whoever guesses
the systems' names, the seed and the program cannot compute whose an image is.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pbe.data.randomness import permutation
from pbe.editing.batch.records import write_image, write_json
from pbe.editing.images import grey_out
from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.benchmark.edits import EditFolder
from pbe.files import expand_home, make_folder
from pbe.html import data_uri, render_page, write_html

TEMPLATE = Path(__file__).with_name("page.html.j2")
KEY = "key.json"
KEY_FORMAT = "pbe-study-key-1"
PAGE = "page"
PICTURES = "pictures"
MAX_SYSTEMS = 9  # as many as there are digits to press
QUESTIONS = {
    "quality": "Which edit looks best? Rank them from the most to the least realistic image.",
    "consistency": (
        "Which edit shows the reference's object? Rank them from the most to the least like the reference."
    ),
}


@dataclass(frozen=True)
class StudySettings:
    """What a study is made of.

    Attributes:
        groups: number of cases to rank, drawn from those that every system has an edit of.
        seed: of the draw of cases.
        title: of the page.
        copy: put the images beside the page instead of into it.
    """

    groups: int = 30
    seed: int = 0
    title: str = "Which edit is better?"
    copy: bool = False


def make_study(
    systems: Mapping[str, Path], benchmark: BenchmarkFolder, out: Path, settings: StudySettings
) -> Path:
    """Write the page and its key, which no two calls make alike; return the page's path.

    Args:
        systems: name to folder of edits.
        benchmark: that was edited.
        out: new folder for ``key.json`` and for ``page/``, which may be published: ``index.html`` and, with
            ``copy``, ``pictures/``.
        settings: how many groups, which.
    """
    if not 2 <= len(systems) <= MAX_SYSTEMS:
        raise UserError(f"a study compares 2 to {MAX_SYSTEMS} systems, not {len(systems)}")
    if settings.groups < 1:
        raise UserError("a study needs at least one group")
    folders = {name: EditFolder(folder, benchmark) for name, folder in systems.items()}
    chosen = _choose(folders, benchmark, settings)
    for position in chosen:
        benchmark[position]  # what cannot be read is told before the folder is begun
    if any(make_folder(out).iterdir()):
        raise UserError(f"'{out}' is not empty; name a new folder")
    published = make_folder(out / PAGE)
    groups, key = [], {}
    salt, copy_to = secrets.token_hex(16), published if settings.copy else None
    for number, position in enumerate(chosen, start=1):
        name = f"{number:02d}"
        owners = {_opaque(salt, name, system): system for system in folders}
        groups.append(_group(name, position, owners, folders, benchmark, copy_to))
        key[name] = {"case": benchmark.ids[position], "edits": owners}
    study = _opaque(salt, "study")
    write_json(
        out / KEY,
        {
            "format": KEY_FORMAT,
            "study": study,
            "salt": salt,
            "systems": sorted(systems),
            "questions": list(QUESTIONS),
            "benchmark": benchmark.sha256,
            "groups": key,
        },
    )
    questions = [{"id": name, "text": text} for name, text in QUESTIONS.items()]
    data = {"study": study, "title": settings.title, "questions": questions, "groups": groups}
    page = render_page(TEMPLATE, title=settings.title, data=data)
    write_html(page, published / "index.html")
    return published / "index.html"


def _opaque(salt: str, *what: str) -> str:
    """Return the name of a thing that only those can tell who have the salt."""
    return hashlib.sha256("\0".join((salt, *what)).encode()).hexdigest()[:16]


def _choose(
    folders: Mapping[str, EditFolder], benchmark: BenchmarkFolder, settings: StudySettings
) -> list[int]:
    """Return positions of the cases, in the order drawn, that every system has a whole edit of."""
    chosen: list[int] = []
    for position in permutation(len(benchmark), settings.seed, "study-cases"):
        if len(chosen) == settings.groups:
            break
        size = benchmark.sizes[int(position)]
        edits = [folder[int(position)] for folder in folders.values()]
        if all(edit is not None and edit.shape[:2] == size for edit in edits):
            chosen.append(int(position))
    if len(chosen) < settings.groups:
        raise UserError(
            f"only {len(chosen)} cases have whole edits by all systems, not {settings.groups} as asked for"
        )
    return chosen


def _group(
    name: str,
    position: int,
    owners: Mapping[str, str],
    folders: Mapping[str, EditFolder],
    benchmark: BenchmarkFolder,
    copy_to: Path | None,
) -> dict[str, Any]:
    """Return what the page shows of a group.

    Edits are written in the order of their opaque names, since files tell when they were written.
    """
    case = benchmark[position]
    shown = {
        "source": case.image,
        "hole": grey_out(case.image, case.mask > 127),
        "exemplar": case.exemplar,
    }
    addresses = {what: _address(f"{name}-{what}", picture, copy_to) for what, picture in shown.items()}
    edits = []
    for opaque, system in sorted(owners.items()):
        edit = folders[system][position]
        assert edit is not None
        edits.append({"id": opaque, "src": _address(f"{name}-{opaque}", edit, copy_to)})
    return {"id": name, **addresses, "edits": edits}


def _address(name: str, picture: np.ndarray, copy_to: Path | None) -> str:
    if copy_to is None:
        return data_uri(picture)
    write_image(make_folder(copy_to / PICTURES) / f"{name}.png", Image.fromarray(picture))
    return f"{PICTURES}/{name}.png"


def parse_systems(texts: Sequence[str]) -> dict[str, Path]:
    """Read ``name=folder`` pairs."""
    systems: dict[str, Path] = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not (separator and name.strip() and folder):
            raise UserError(f"'{text}' is no system; write name=folder")
        if name.strip() in systems:
            raise UserError(f"the system '{name.strip()}' is named twice")
        systems[name.strip()] = Path(expand_home(folder))
    return systems
