"""What the rows of an ablation scored: values over cases and seeds, their intervals and their differences."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pbe.errors import UserError
from pbe.evaluation.ablation.config import Ablation
from pbe.evaluation.ablation.plan import Cell, Plan
from pbe.evaluation.ablation.scoring import Measured, read_scores
from pbe.evaluation.ablation.statistics import (
    Difference,
    hierarchical_interval,
    paired_difference,
    set_difference,
)
from pbe.evaluation.ablation.tables import changes, settings_of
from pbe.evaluation.estimates import Estimate


@dataclass(frozen=True)
class Results:
    """Everything that tables and figures show.

    Attributes:
        ablation: its settings.
        plan: with the folders of models, edits and scores.
        scores: of each seed, by row and metric, seeds in order.
        metrics: (name, family, better direction) of the scores that were made somewhere.
        estimates: by row and metric, over cases and seeds.
        differences: of the pairs that are compared.
        not_run: (metric, why) of those that were made nowhere.
    """

    ablation: Ablation
    plan: Plan
    scores: dict[tuple[str, str], list[Measured]]
    metrics: tuple[tuple[str, str, str], ...]
    estimates: dict[tuple[str, str], Estimate]
    differences: tuple[Difference, ...]
    not_run: tuple[tuple[str, str], ...]

    @property
    def titles(self) -> dict[str, str]:
        """Titles of the rows by name."""
        return {row.name: row.title for row in self.ablation.rows}

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds."""
        config = self.ablation.config
        rows = []
        for number, row in enumerate(self.ablation.rows):
            cells = self.plan.of(row.name)
            before = self.plan.of(self.ablation.rows[number - 1].name)[0] if number else None
            rows.append(
                {
                    "name": row.name,
                    "title": row.title,
                    "settings": settings_of(cells[0]),
                    "changes": [list(change) for change in changes(before, cells[0])],
                    "seeds": [self._cell(cell, place) for place, cell in enumerate(cells)],
                    "scores": {name: self._estimate(row.name, name) for name, _, _ in self.metrics},
                }
            )
        return {
            "name": config.name,
            "seeds": list(config.seeds),
            "benchmark": str(self.plan.benchmark),
            "evaluation": vars(config.evaluation),
            "metrics": [
                {"name": name, "family": family, "better": better} for name, family, better in self.metrics
            ],
            "not_run": dict(self.not_run),
            "rows": rows,
            "differences": [_finite(asdict(one)) for one in self.differences],
        }

    def _estimate(self, row: str, metric: str) -> dict[str, Any]:
        return _finite(asdict(self.estimates[row, metric]))

    def _cell(self, cell: Cell, place: int) -> dict[str, Any]:
        scores = {name: self.scores[cell.row.name, name][place] for name, _, _ in self.metrics}
        return {
            "seed": cell.seed,
            "model": str(cell.model),
            "edits": str(cell.edits.folder / "pictures"),
            "training": cell.training.fingerprint,
            "scores": {name: _finite({"value": one.value})["value"] for name, one in scores.items()},
            "cards": {name: one.card for name, one in scores.items()},
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON can hold them: NaN as null, infinite ones as text."""
    return {
        key: (None if math.isnan(value) else value if math.isfinite(value) else str(value))
        if isinstance(value, float)
        else value
        for key, value in values.items()
    }


def gather(ablation: Ablation, plan: Plan) -> Results:
    """Read the scores of all cells and compare the rows.

    Raises:
        UserError: the rows were scored on other cases, or with other scores.
    """
    names_of_rows = [row.name for row in ablation.rows]
    read = {row: [read_scores(cell.scores.folder) for cell in plan.of(row)] for row in names_of_rows}
    every = [scores for cells in read.values() for scores in cells]
    names = list(every[0])
    if any(list(scores) != names for scores in every):
        raise UserError("the rows were not scored alike; delete the folder 'scores' of the workspace")
    ran = [name for name in names if all(not math.isnan(scores[name].value) for scores in every)]
    scores = {(row, name): [one[name] for one in cells] for row, cells in read.items() for name in names}
    options = ablation.config.evaluation
    estimates = {
        (row.name, name): estimate_of(scores[row.name, name], options.resamples, options.level)
        for row in ablation.rows
        for name in ran
    }
    differences = [
        compare(name, (first, second), scores, options.resamples, options.level)
        for first, second in ablation.config.comparisons
        for name in ran
    ]
    absent = tuple((name, _why(name, every)) for name in names if name not in ran)
    metrics = tuple((name, every[0][name].family, every[0][name].better) for name in ran)
    return Results(ablation, plan, scores, metrics, estimates, tuple(differences), absent)


def _why(name: str, every: list[dict[str, Measured]]) -> str:
    return next((scores[name].why_not for scores in every if scores[name].why_not), "not a number")


def estimate_of(seeds: list[Measured], resamples: int, level: float) -> Estimate:
    """Return a row's score over its seeds: their mean, with an interval over cases and seeds.

    Scores of whole sets, and those whose value is not the mean of its cases, have no cases to draw: theirs
    goes from the lowest end of the seeds' own intervals to the highest.
    """
    value = float(np.mean([one.value for one in seeds]))
    if is_geometric(seeds):
        logs = hierarchical_interval(np.log(_stacked(seeds)), resamples=resamples, level=level)
        return Estimate(*(math.exp(number) for number in (logs.value, logs.low, logs.high)))
    if not is_mean(seeds):
        return Estimate(value, min(one.low for one in seeds), max(one.high for one in seeds))
    return hierarchical_interval(_stacked(seeds), resamples=resamples, level=level)


def _stacked(seeds: list[Measured]) -> np.ndarray:
    return np.stack([one.per_case for one in seeds if one.per_case is not None])


def is_mean(seeds: list[Measured]) -> bool:
    """Say whether a score is the mean of its cases' values, so that cases can be drawn and paired."""
    for one in seeds:
        if one.per_case is None or not math.isfinite(one.value):
            return False
        kept = one.per_case[np.isfinite(one.per_case)]
        if not len(kept) or not math.isclose(float(kept.mean()), one.value, rel_tol=1e-6, abs_tol=1e-9):
            return False
    return len({len(one.per_case) for one in seeds if one.per_case is not None}) == 1


def is_geometric(seeds: list[Measured]) -> bool:
    """Say whether a score is the geometric mean of its cases' values."""
    if is_mean(seeds) or any(one.per_case is None or not one.value > 0.0 for one in seeds):
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [np.log(one.per_case) for one in seeds if one.per_case is not None]
    return is_mean(
        [replace(one, value=math.log(one.value), per_case=of) for one, of in zip(seeds, logs, strict=True)]
    )


def compare(
    name: str,
    rows: tuple[str, str],
    scores: dict[tuple[str, str], list[Measured]],
    resamples: int,
    level: float,
) -> Difference:
    """Compare two rows by a score: in pairs of cases where it has them."""
    first, second = (scores[row, name] for row in rows)
    if is_mean([*first, *second]):
        stacked = (_stacked(first), _stacked(second))
        return paired_difference(name, rows, *stacked, resamples=resamples, level=level)
    if is_geometric(first) and is_geometric(second):
        logs = (np.log(_stacked(first)), np.log(_stacked(second)))
        return replace(paired_difference(name, rows, *logs, resamples=resamples, level=level), log=True)
    ends = [[Estimate(one.value, one.low, one.high) for one in row] for row in (first, second)]
    return set_difference(name, rows, *ends)
