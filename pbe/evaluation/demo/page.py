"""What the demo's page says of a training run, a set of edits and their scores."""

from __future__ import annotations

import base64
import io
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pbe.editing.batch.jobs import read_pairs
from pbe.editing.images import grey_out, read_image, read_mask
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.generation import GenerateSettings, at_scales
from pbe.evaluation.benchmark.toy import ToyCase, ToyEdits
from pbe.evaluation.benchmark.toy_run import Row, ToyScores
from pbe.evaluation.metrics.bootstrap import CHOICE
from pbe.evaluation.report import Table, at_side
from pbe.evaluation.study.naming import readable
from pbe.html import Tile
from pbe.training.monitoring.loggers import read_curve

TEMPLATE = Path(__file__).with_name("page.html.j2")
PACKAGES = ("torch", "pytorch-lightning", "numpy", "opencv-python-headless", "timm", "open-clip-torch")
SOFT, ACCENT, SECOND = "#7d858e", "#d0633a", "#3f87c9"  # each reads on a light and on a dark page
Points = Sequence[tuple[float, float]]
TITLE = "Paint by Example on the toy world"
TILE = 256  # side of a tile, pixels: four times a toy image


@dataclass(frozen=True)
class TrainingCurve:
    """Losses of a run, read from its ``metrics.csv``.

    Attributes:
        train: (step, loss).
        validation: (step, loss) on the fixed grid of samples, timesteps and noise.
        by_timestep: timestep to (loss before the first step, loss after the last).
    """

    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    by_timestep: dict[int, tuple[float, float]]

    @property
    def ends(self) -> tuple[float, float]:
        """Validation loss of the untrained and of the trained model."""
        return self.validation[0][1], self.validation[-1][1]


def read_training(path: Path, timesteps: Sequence[int]) -> TrainingCurve:
    """Read the curves of a run from its ``metrics.csv``, with ``timesteps`` of the validation grid."""
    validation = read_curve(path, "val/loss")
    if len(validation) < 2 or validation[0][0] != 0:
        raise UserError(
            f"{path}: no validation loss from before and after training; set data.validation_shards"
        )
    curves = {timestep: read_curve(path, f"val/loss_t{timestep}") for timestep in timesteps}
    by_timestep = {timestep: (points[0][1], points[-1][1]) for timestep, points in curves.items()}
    return TrainingCurve(read_curve(path, "train/loss_simple"), validation, by_timestep)


def smooth(points: Points, share: float = 0.05) -> list[tuple[float, float]]:
    """Return the running mean over a window of ``share`` of the points, shorter at the start."""
    window = max(1, round(share * len(points)))
    values = [y for _, y in points]
    parts = (values[max(0, i + 1 - window) : i + 1] for i in range(len(points)))
    return [(x, sum(part) / len(part)) for (x, _), part in zip(points, parts, strict=True)]


def training_chart(train: Points, validation: Points) -> str:
    """Draw training and validation losses against the step; return an SVG image as a ``data:`` address."""
    from matplotlib import rc_context  # slow to import
    from matplotlib.figure import Figure

    numbers = [number for point in (*train, *validation) for number in point]
    if not (train and validation) or not all(map(math.isfinite, numbers)):
        raise UserError("the losses of the training run are missing, or some are not finite numbers")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pbe", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.plot(
            *zip(*train, strict=True), color=ACCENT, alpha=0.3, lw=1, label="training, each logged step"
        )
        axes.plot(*zip(*smooth(train), strict=True), color=ACCENT, label="training, running mean")
        axes.plot(*zip(*validation, strict=True), "o-", color=SECOND, ms=4, label="validation, fixed grid")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("optimizer step", color=SOFT)
        axes.set_ylabel("mean squared error", color=SOFT)
        axes.tick_params(colors=SOFT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(SOFT)
        axes.legend(frameon=False, labelcolor=SOFT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def loss_table(curve: TrainingCurve) -> Table:
    """Compare the untrained with the trained model on the validation grid."""
    losses = {f"timestep {timestep}": pair for timestep, pair in curve.by_timestep.items()}
    rows = [
        [name, f"{before:.4f}", f"{after:.4f}", f"{100.0 * (after / before - 1.0):+.1f} %"]
        for name, (before, after) in (losses | {"mean": curve.ends}).items()
    ]
    note = "Squared error on the same held-out samples, timesteps and noise, before and after."
    return Table(["validation loss", "untrained", "trained", "change"], rows, note)


@dataclass(frozen=True)
class Student:
    """Edits by a model of few steps, beside those of the model that it was distilled from.

    Attributes:
        edits: at the last guidance scale of the others.
        steps: calls of the UNet for an edit.
        seconds: of an edit, batched as the others are.
        teacher_calls: halves of guided calls for an edit of the model itself.
        teacher_seconds: of such an edit.
    """

    edits: ToyEdits
    steps: int
    seconds: float
    teacher_calls: int
    teacher_seconds: float

    @property
    def name(self) -> str:
        """What captions and tables call it."""
        return f"{self.steps} steps"


def edit_strips(
    cases: Sequence[ToyCase], edits: ToyEdits, student: Student | None, count: int
) -> list[list[Tile]]:
    """Return strips for the first ``count`` cases: masked, exemplar, edits by guidance, true object."""
    strips = []
    for index, case in enumerate(cases[:count]):
        painted = [(f"guidance {scale:g}", edited[index]) for scale, edited in edits.own.items()]
        if student is not None:
            painted += [(student.name, edited[index]) for edited in student.edits.own.values()]
        shown = [("masked", case.masked), ("exemplar", case.exemplar), *painted]
        strips.append(tiles([*shown, (f"hidden: {readable(case.name)}", case.image)]))
    return strips


def tiles(captioned: Sequence[tuple[str, np.ndarray]]) -> list[Tile]:
    """Return captioned images, uint8 ``h w 3``, as tiles that are large enough to look at."""
    return [Tile(caption, at_side(image, TILE)) for caption, image in captioned]


def edit_outside(
    pipe: PaintByExample, pairs: Path, scales: Sequence[float], settings: GenerateSettings
) -> list[list[Tile]]:
    """Edit triples of files at every guidance scale, each from its job's seed; return a strip for each."""
    strips = []
    for job in read_pairs(pairs, settings.seed):
        image, exemplar = read_image(job.image).pixels, read_image(job.exemplar, "exemplar").pixels
        mask = read_mask(job.mask).pixels
        captioned = [("masked", grey_out(image, mask)), ("exemplar", exemplar)]
        for each in at_scales(settings, scales):
            generator = torch.Generator().manual_seed(job.seed)
            edit = pipe.edit(exemplar, image, mask, **each.call(pipe.model.config), generator=generator)
            captioned.append((f"guidance {each.guidance_scale:g}", np.asarray(edit.images[0])))
        strips.append(tiles([*captioned, ("photograph", image)]))
    return strips


def headline(
    scores: ToyScores, curve: TrainingCurve, student: tuple[Student, Row] | None
) -> list[tuple[str, str]]:
    """Return the page's headline numbers and what they mean, at the last guidance scale that was edited."""
    scale, row = list(scores.guidance.items())[-1]
    auc, first, ceiling = row.auc, row.first_of_20, scores.ceiling
    figures = [
        (
            f"{auc.value:.2f}",
            f"AUC, right against shuffled exemplar, at guidance {scale:g} ({auc.low:.2f} to {auc.high:.2f}); "
            f"{row.grey_auc.value:.2f} with all images turned grey; the true objects reach "
            f"{ceiling.auc.value:.2f} and {ceiling.grey_auc.value:.2f}",
        )
    ]
    if first is not None and row.grey_first_of_20 is not None and ceiling.first_of_20 is not None:
        figures.append(
            (
                f"{100 * first.value:.0f} %",
                f"of the edits resemble their own exemplar most of {CHOICE} "
                f"({100 * first.low:.0f} to {100 * first.high:.0f}), "
                f"{100 * row.grey_first_of_20.value:.0f} % in grey; of the true objects "
                f"{100 * ceiling.first_of_20.value:.0f} %",
            )
        )
    if student is not None:
        fast, own = student
        figures.append(
            (
                f"{fast.teacher_seconds / fast.seconds:.0f} ×",
                f"faster by the distilled model: {1000 * fast.seconds:.0f} ms for an edit in {fast.steps} "
                f"calls, not {1000 * fast.teacher_seconds:.0f} ms in {fast.teacher_calls}; AUC "
                f"{own.auc.value:.2f} and {auc.value:.2f}",
            )
        )
    before, after = curve.ends
    steps = f"validation loss of a new model in {curve.validation[-1][0]} optimizer steps"
    return [*figures, (f"{before:.2f} → {after:.2f}", steps)]


def page_values(
    cases: Sequence[ToyCase],
    edits: ToyEdits,
    scores: ToyScores,
    curve: TrainingCurve,
    student: tuple[Student, Row] | None,
    shown: int,
) -> dict[str, Any]:
    """Return what the page shows of edits (the first ``shown``), scores and training, for the template."""
    table = scores.table()
    rows = list(table.rows)
    if student is not None:
        scale = list(student[0].edits.own)[-1]
        rows.insert(len(edits.own), [f"{student[0].name}, guidance {scale:g}", *student[1].cells()])
    explained = (
        f"{table.note} AUC: how often a region painted with its exemplar resembles that exemplar more than a "
        "region painted with a shuffled one does (same scenes, masks and noise); 0.5 is chance. First of "
        f"{CHOICE}: how often its own exemplar is the most similar of {CHOICE}; {1 / CHOICE:g} is chance. "
        "Grey: all images turned grey first, so that colour cannot tell. No edit can be expected to score "
        "above what the autoencoder lets through."
    )
    return {
        "title": TITLE,
        "figures": headline(scores, curve, student),
        "edits": edit_strips(cases, edits, student and student[0], shown),
        "curve": training_chart(curve.train, curve.validation),
        "losses": loss_table(curve),
        "scores": Table(table.head, rows, explained),
    }


def machine_facts() -> list[tuple[str, str]]:
    """Return what the run ran on: processor, cores, Python and the packages that matter."""
    table = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:(.*)", table.read_text()) if table.is_file() else []
    facts = [
        ("Processor", names[0].strip() if names else platform.processor() or platform.machine()),
        ("Cores", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads"),
        ("System", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
    ]
    return facts + [(name, metadata.version(name)) for name in PACKAGES]
