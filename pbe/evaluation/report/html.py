"""The report page: one HTML file that holds its pictures and needs no network."""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from pbe.files import make_folder, write_output

TEMPLATE = "report/report.html.j2"
PACKAGES = ("torch", "pytorch-lightning", "numpy", "opencv-python-headless", "timm", "open-clip-torch")


@dataclass(frozen=True)
class Tile:
    """A picture with its caption: uint8 ``h w 3``."""

    caption: str
    picture: np.ndarray


@dataclass(frozen=True)
class Stage:
    """A step of the run: its name, how long it took, and a sentence on what came out."""

    name: str
    seconds: float
    note: str


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A number of the headline with what it means."""

    value: str
    meaning: str


@dataclass
class Report:
    """Everything the page shows. Texts are escaped; ``curve`` is markup of this package's own charts.

    Attributes:
        title: of the page.
        lead: a paragraph on what this is.
        figures: the headline's numbers.
        edits: a strip of tiles for each case.
        outside: likewise, of edits outside the world that the model was trained on.
        curve: an SVG chart of the training run.
        losses: untrained against trained.
        grids: larger pictures.
        scores: table of scores.
        stages: with their times.
        machine: (what, value).
        steps: (what one gets, the command).
    """

    title: str
    lead: str
    figures: list[Figure] = field(default_factory=list)
    edits: list[list[Tile]] = field(default_factory=list)
    edits_note: str = ""
    outside: list[list[Tile]] = field(default_factory=list)
    outside_note: str = ""
    curve: str = ""
    losses: Table | None = None
    grids: list[Tile] = field(default_factory=list)
    scores: Table | None = None
    stages: list[Stage] = field(default_factory=list)
    machine: list[tuple[str, str]] = field(default_factory=list)
    steps: list[tuple[str, str]] = field(default_factory=list)


def data_uri(picture: np.ndarray) -> str:
    """Return a picture, uint8 ``h w 3``, as a PNG in a ``data:`` address."""
    return _data_uri(picture, "png", optimize=True)


def small_uri(picture: np.ndarray) -> str:
    """Return a picture, uint8 ``h w 3``, as a WebP of high quality: a tenth of the PNG of an enlarged one."""
    return _data_uri(picture, "webp", quality=90)


def _data_uri(picture: np.ndarray, kind: str, **settings: int | bool) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **settings)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def page_environment() -> Environment:
    """Return jinja2's environment for pages: templates by their path from here, escaping, ``data_uri``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "small_uri": small_uri}
    return environment


def render(report: Report) -> str:
    """Return the page's HTML."""
    total = sum(stage.seconds for stage in report.stages)
    return page_environment().get_template(TEMPLATE).render(report=report, total=total)


def write_page(report: Report, path: Path) -> None:
    """Write the page; the file appears under its name only when it is complete."""
    write_html(render(report), path)


def write_html(page: str, path: Path) -> None:
    """Write a page; the file appears under its name only when it is complete.

    Raises:
        UserError: the file cannot be written.
    """
    make_folder(path.parent)
    write_output(path, page)


def machine_facts() -> list[tuple[str, str]]:
    """Return what the run ran on: processor, cores, Python and the packages that matter."""
    facts = [
        ("Processor", _processor()),
        ("Cores", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads"),
        ("System", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
    ]
    return facts + [(name, metadata.version(name)) for name in PACKAGES]


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
