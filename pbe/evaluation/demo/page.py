"""What the demo's page says: the report made of a training run, a set of edits and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pbe.editing.batch.pairs import read_pairs
from pbe.editing.images import grey_out, read_image, read_mask
from pbe.editing.output import EditOutput
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.sheets import at_side
from pbe.evaluation.benchmark.toy import BenchmarkCase
from pbe.evaluation.benchmark.toy_edits import BenchmarkEdits, EditSettings
from pbe.evaluation.benchmark.toy_scores import Scores, score_table
from pbe.evaluation.demo.charts import Line, line_chart, smooth
from pbe.evaluation.metrics.bootstrap import CHOICE
from pbe.evaluation.report.html import Figure, Report, Table, Tile
from pbe.evaluation.study.naming import readable
from pbe.training.monitoring.loggers import read_curve

TITLE = "Paint by Example on the toy world"
LEAD = (
    "An image, a mask and an exemplar go in; out comes the image with the exemplar's object painted into the "
    "masked region, fitted to its new place. This page was made by one run on this machine: scenes were "
    "rendered and packed, a fresh model was trained on them for a short while, and the model that ships "
    "with the project edited scenes whose objects and backgrounds no training has seen."
)
EDITS_NOTE = (
    "Test objects in test panoramas: the first ones in the benchmark's order, not chosen. The exemplar shows "
    "the hidden object in another pose, light and place. Each strip: the masked scene, the exemplar, edits "
    "at rising guidance, and what was hidden. Small images are enlarged by Lanczos' filter."
)
OUTSIDE_NOTE = (
    "Photographs as scene and as exemplar, of which this model has seen none: it was trained on rendered "
    "objects before photographed panoramas. The photographs are free (data/examples/outside/LICENCES.md), "
    "the edits those of the first seed, not chosen."
)
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
    def before(self) -> float:
        """Validation loss of the untrained model."""
        return self.validation[0][1]

    @property
    def after(self) -> float:
        """Validation loss of the trained model."""
        return self.validation[-1][1]


def read_training(path: Path, timesteps: Sequence[int]) -> TrainingCurve:
    """Read the curves of a run.

    Args:
        path: its ``metrics.csv``.
        timesteps: of the validation grid.

    Raises:
        UserError: the validation loss was not logged before the first step and after the last.
    """
    validation = read_curve(path, "val/loss")
    if len(validation) < 2 or validation[0][0] != 0:
        raise UserError(
            f"{path}: no validation loss from before and after training; set data.validation_shards"
        )
    by_timestep = {}
    for timestep in timesteps:
        values = read_curve(path, f"val/loss_t{timestep}")
        by_timestep[timestep] = (values[0][1], values[-1][1])
    return TrainingCurve(read_curve(path, "train/loss_simple"), validation, by_timestep)


def training_chart(curve: TrainingCurve) -> str:
    """Draw training and validation losses against the step."""
    lines = [
        Line("training, each logged step", curve.train, "raw"),
        Line("training, running mean", smooth(curve.train), "main"),
        Line("validation, fixed grid", curve.validation, "second", marks=True),
    ]
    title = "Loss of the model trained just now"
    return line_chart(lines, title=title, x_label="optimizer step", y_label="mean squared error")


def loss_table(curve: TrainingCurve) -> Table:
    """Compare the untrained with the trained model on the validation grid."""
    rows = [[f"timestep {t}", *_fall(*pair)] for t, pair in curve.by_timestep.items()]
    rows.append(["mean", *_fall(curve.before, curve.after)])
    note = "Squared error on the same held-out samples, timesteps and noise, before and after."
    return Table(["validation loss", "untrained", "trained", "change"], rows, note)


def _fall(before: float, after: float) -> list[str]:
    return [f"{before:.4f}", f"{after:.4f}", f"{100.0 * (after / before - 1.0):+.1f} %"]


def edit_strips(cases: Sequence[BenchmarkCase], edits: BenchmarkEdits, count: int) -> list[list[Tile]]:
    """Return strips for the first ``count`` cases: masked, exemplar, edits by guidance, true object."""
    strips = []
    for index, case in enumerate(cases[:count]):
        painted = [(f"guidance {scale:g}", pictures[index]) for scale, pictures in edits.own.items()]
        shown = [("masked", case.masked), ("exemplar", case.exemplar), *painted]
        strips.append(tiles([*shown, (f"hidden: {readable(case.name)}", case.image)]))
    return strips


def tiles(captioned: Sequence[tuple[str, np.ndarray]]) -> list[Tile]:
    """Return captioned images, uint8 ``h w 3``, as tiles that are large enough to look at."""
    return [Tile(caption, at_side(picture, TILE)) for caption, picture in captioned]


def edit_outside(pipe: PaintByExample, pairs: Path, settings: EditSettings) -> list[list[Tile]]:
    """Edit triples of files at every guidance scale, each from its job's seed; return a strip for each.

    Raises:
        UserError: a file cannot be read.
    """
    strips = []
    for job in read_pairs(pairs, settings.seed):
        image, exemplar = read_image(job.image).pixels, read_image(job.exemplar, "exemplar").pixels
        hole = read_mask(job.mask).pixels
        captioned = [("masked", grey_out(image, hole)), ("exemplar", exemplar)]
        for scale in settings.guidance:
            edit = pipe(
                exemplar,
                image,
                hole,
                num_inference_steps=settings.steps,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(job.seed),
                solver=settings.solver,
            )
            assert isinstance(edit, EditOutput)
            captioned.append((f"guidance {scale:g}", np.asarray(edit.images[0])))
        strips.append(tiles([*captioned, ("photograph", image)]))
    return strips


def headline(scores: Scores, curve: TrainingCurve) -> list[Figure]:
    """Return the page's headline numbers, at the last guidance scale that was edited."""
    scale, row = list(scores.guidance.items())[-1]
    auc, first, ceiling = row.auc, row.first, scores.ceiling
    figures = [
        Figure(
            f"{auc.value:.2f}",
            f"AUC, right against shuffled exemplar, at guidance {scale:g} ({auc.low:.2f} to {auc.high:.2f}); "
            f"{row.grey_auc.value:.2f} with all images turned grey; the true objects reach "
            f"{ceiling.auc.value:.2f} and {ceiling.grey_auc.value:.2f}",
        ),
    ]
    if first is not None and row.grey_first is not None and ceiling.first is not None:
        figures.append(
            Figure(
                f"{100 * first.value:.0f} %",
                f"of the edits resemble their own exemplar most of {CHOICE} "
                f"({100 * first.low:.0f} to {100 * first.high:.0f}), "
                f"{100 * row.grey_first.value:.0f} % in grey; of the true objects "
                f"{100 * ceiling.first.value:.0f} %",
            )
        )
    change = f"{curve.before:.2f} → {curve.after:.2f}"
    steps = curve.validation[-1][0]
    return [*figures, Figure(change, f"validation loss of a new model in {steps} optimizer steps")]


def build_report(
    cases: Sequence[BenchmarkCase],
    edits: BenchmarkEdits,
    scores: Scores,
    curve: TrainingCurve,
    grids: list[tuple[str, np.ndarray]],
    shown: int,
    outside: list[list[Tile]] | None = None,
) -> Report:
    """Assemble the page but for stages, machine and next steps, which the caller knows.

    Args:
        cases: that were edited.
        edits: of the shipped model.
        scores: of these edits.
        curve: of the training run.
        grids: caption and picture (uint8 ``h w 3``).
        shown: number of cases whose edits appear.
        outside: strips of edits outside the toy world.
    """
    head, rows, note = score_table(scores)
    explained = (
        f"{note} AUC: how often a region painted with its exemplar resembles that exemplar more than a "
        "region painted with a shuffled one does (same scenes, masks and noise); 0.5 is chance. First of "
        f"{CHOICE}: how often its own exemplar is the most similar of {CHOICE}; {1 / CHOICE:g} is chance. "
        "Grey: all images turned grey first, so that colour cannot tell. No edit can be expected to score "
        "above what the autoencoder lets through."
    )
    return Report(
        title=TITLE,
        lead=LEAD,
        figures=headline(scores, curve),
        edits=edit_strips(cases, edits, shown),
        edits_note=EDITS_NOTE,
        outside=outside or [],
        outside_note=OUTSIDE_NOTE,
        curve=training_chart(curve),
        losses=loss_table(curve),
        grids=[Tile(caption, picture) for caption, picture in grids],
        scores=Table(head, rows, explained),
    )
