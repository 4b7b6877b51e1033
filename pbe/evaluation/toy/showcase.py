"""What the demo's page says: the report made of a training run, a set of edits and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pbe.errors import UserError
from pbe.evaluation.report import Figure, Report, Table, Tile
from pbe.evaluation.toy.benchmark import BenchmarkCase
from pbe.evaluation.toy.charts import Line, line_chart, smooth
from pbe.evaluation.toy.edits import BenchmarkEdits
from pbe.evaluation.toy.scores import Scores, score_table
from pbe.training.loggers import read_curve

TITLE = "Paint by Example on the toy world"
LEAD = (
    "A picture, a mask and an exemplar go in; out comes the picture with the exemplar's object painted "
    "into the hole, fitted to its new place. This page was made by one run on this machine: scenes were "
    "rendered and packed, a fresh model was trained on them for a short while, and the model that ships "
    "with the project edited scenes whose objects and backgrounds no training has seen."
)
EDITS_NOTE = (
    "Test objects in test panoramas. The exemplar shows the hidden object in another pose, light and place. "
    "Each strip: the scene with its hole, the exemplar, edits at rising guidance, and what was hidden."
)


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
        painted = [Tile(f"guidance {scale:g}", pictures[index]) for scale, pictures in edits.own.items()]
        hidden = Tile(f"hidden: {case.name}", case.image)
        strips.append([Tile("masked", case.masked), Tile("exemplar", case.exemplar), *painted, hidden])
    return strips


def headline(scores: Scores, curve: TrainingCurve) -> list[Figure]:
    """Return the page's headline numbers, at the last guidance scale that was edited."""
    scale, row = list(scores.guidance.items())[-1]
    auc, similarity = row.auc, row.similarity
    return [
        Figure(
            f"{auc.value:.2f}",
            f"AUC, right against shuffled exemplar, at guidance {scale:g} ({auc.low:.2f} to {auc.high:.2f}); "
            f"the true objects reach {scores.ceiling.auc.value:.2f}",
        ),
        Figure(
            f"{similarity.value:.2f}",
            f"similarity of the painted region to its exemplar; shuffled {row.shuffled.value:.2f}, "
            f"true object {scores.ceiling.similarity.value:.2f}",
        ),
        Figure(
            f"{curve.before:.2f} → {curve.after:.2f}",
            f"validation loss of a new model in {curve.validation[-1][0]} optimizer steps",
        ),
    ]


def build_report(
    cases: Sequence[BenchmarkCase],
    edits: BenchmarkEdits,
    scores: Scores,
    curve: TrainingCurve,
    grids: list[tuple[str, np.ndarray]],
    shown: int,
) -> Report:
    """Assemble the page but for stages, machine and next steps, which the caller knows.

    Args:
        cases: that were edited.
        edits: of the shipped model.
        scores: of these edits.
        curve: of the training run.
        grids: caption and picture (uint8 ``h w 3``).
        shown: number of cases whose edits appear.
    """
    head, rows, note = score_table(scores)
    explained = (
        f"{note} AUC: how often a region painted with its exemplar resembles that exemplar more than a "
        "region painted with a shuffled one does (same scenes, masks and noise); 0.5 is chance."
    )
    return Report(
        title=TITLE,
        lead=LEAD,
        figures=headline(scores, curve),
        edits=edit_strips(cases, edits, shown),
        edits_note=EDITS_NOTE,
        curve=training_chart(curve),
        losses=loss_table(curve),
        grids=[Tile(caption, picture) for caption, picture in grids],
        scores=Table(head, rows, explained),
    )
