"""What the rows of an ablation scored: values over cases and seeds, their intervals and their differences."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pbe.errors import UserError
from pbe.evaluation.ablation.config import Ablation
from pbe.evaluation.ablation.measuring import read_scores
from pbe.evaluation.ablation.plan import PICTURES, Cell, Plan
from pbe.evaluation.ablation.stages import without_aside
from pbe.evaluation.ablation.statistics import (
    Difference,
    case_interval,
    difference_of,
    paired_difference,
    seed_margin,
    set_difference,
    widened,
)
from pbe.evaluation.metrics.base import Score
from pbe.evaluation.metrics.bootstrap import Estimate


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
    scores: dict[tuple[str, str], list[Score]]
    metrics: tuple[tuple[str, str, str], ...]
    estimates: dict[tuple[str, str], Estimate]
    differences: tuple[Difference, ...]
    not_run: tuple[tuple[str, str], ...]

    @property
    def titles(self) -> dict[str, str]:
        """Titles of the rows by name."""
        return {row.name: row.title for row in self.ablation.rows}

    def compared(self) -> list[tuple[Cell | None, Cell]]:
        """Return each row's first cell, behind that of the row that its settings are compared with."""
        cells = [self.plan.of(row.name)[0] for row in self.ablation.rows]
        cumulative = self.ablation.config.cumulative
        others = [None, *(cells[:-1] if cumulative else cells[:1] * (len(cells) - 1))]
        return list(zip(others, cells, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds."""
        config = self.ablation.config
        names = [name for name, _, _ in self.metrics]
        rows = [
            {
                "name": first.row.name,
                "title": first.row.title,
                "settings": settings_of(first),
                "changes": [list(change) for change in changes(before, first)],
                "seeds": [self._cell(cell, place) for place, cell in enumerate(self.plan.of(first.row.name))],
                "scores": {name: _finite(asdict(self.estimates[first.row.name, name])) for name in names},
            }
            for before, first in self.compared()
        ]
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

    def _cell(self, cell: Cell, place: int) -> dict[str, Any]:
        scores = {name: self.scores[cell.row.name, name][place] for name, _, _ in self.metrics}
        return {
            "seed": cell.seed,
            "model": str(cell.model),
            "edits": str(cell.edits.folder / PICTURES),
            "training": cell.training.fingerprint,
            "scores": _finite({name: one.value for name, one in scores.items()}),
            "cards": {name: asdict(one.card) for name, one in scores.items()},
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
    """Read the scores of all cells and compare the rows."""
    names_of_rows = [row.name for row in ablation.rows]
    read = {row: [read_scores(cell.scores.folder) for cell in plan.of(row)] for row in names_of_rows}
    every = [scores for cells in read.values() for scores in cells]
    names = list(every[0])
    if any(list(scores) != names for scores in every):
        raise UserError("the rows were not scored alike; delete the folder 'scores' of the workspace")
    ran = [name for name in names if all(not math.isnan(scores[name].value) for scores in every)]
    scores = {(row, name): [one[name] for one in cells] for row, cells in read.items() for name in names}
    options = ablation.config.evaluation
    estimates: dict[tuple[str, str], Estimate] = {}
    for name in ran:
        margin = seed_margin([seed_values(scores[row, name]) for row in names_of_rows], level=options.level)
        for row in names_of_rows:
            estimates[row, name] = estimate_of(scores[row, name], options.resamples, options.level, margin)
    pairs = [(first, second) for first, second in ablation.config.comparisons]
    margins = {name: pair_margin(name, pairs, scores, options.level) for name in ran}
    differences = [
        compare(name, pair, scores, options.resamples, options.level, margins[name])
        for pair in pairs
        for name in ran
    ]
    absent = tuple((name, _why(name, every)) for name in names if name not in ran)
    metrics = tuple((name, every[0][name].family, every[0][name].better) for name in ran)
    return Results(ablation, plan, scores, metrics, estimates, tuple(differences), absent)


def _why(name: str, every: list[dict[str, Score]]) -> str:
    return next((scores[name].why_not for scores in every if scores[name].why_not), "not a number")


def seed_values(seeds: list[Score]) -> np.ndarray:
    """Return a row's value of each seed, ``(s,)``; logarithms of geometric means."""
    values = np.array([one.value for one in seeds])
    return np.log(values) if is_geometric(seeds) else values


def pair_margin(
    name: str, pairs: list[tuple[str, str]], scores: dict[tuple[str, str], list[Score]], level: float
) -> float:
    """Return what chance between trainings adds to the interval of a score's differences.

    Pairs of r rows have r - 1 independent differences at most.
    """
    groups = [difference_of(*(seed_values(scores[row, name]) for row in pair)) for pair in pairs]
    return seed_margin(groups, level=level, most=max(len({row for pair in pairs for row in pair}) - 1, 1))


def estimate_of(seeds: list[Score], resamples: int, level: float, margin: float = 0.0) -> Estimate:
    """Return a row's score over its seeds: their mean, with an interval over cases and trainings.

    Scores of whole sets, and those whose value is not the mean of its cases, have no cases to draw: theirs
    has the mean width of the seeds' own intervals.

    Args:
        seeds: the score of each.
        resamples: of the bootstrap over cases.
        level: of the interval.
        margin: what chance between trainings adds, in logarithms for geometric means.
    """
    if is_geometric(seeds):
        logs = case_interval(np.log(_stacked(seeds)), resamples=resamples, level=level)
        wide = widened(logs, margin)
        return Estimate(*(math.exp(number) for number in (wide.value, wide.low, wide.high)))
    if is_mean(seeds):
        return widened(case_interval(_stacked(seeds), resamples=resamples, level=level), margin)
    value, low, high = (
        float(np.mean([getattr(one, end) for one in seeds])) for end in ("value", "low", "high")
    )
    if not math.isfinite(value):
        return Estimate(value, low, high)
    return widened(Estimate(value, low, high), margin)


def _stacked(seeds: list[Score]) -> np.ndarray:
    return np.stack([one.per_case for one in seeds if one.per_case is not None])


def is_mean(seeds: list[Score]) -> bool:
    """Say whether a score is the mean of its cases' values, so that cases can be drawn and paired."""
    for one in seeds:
        if one.per_case is None or not math.isfinite(one.value):
            return False
        kept = one.per_case[np.isfinite(one.per_case)]
        if not len(kept) or not math.isclose(float(kept.mean()), one.value, rel_tol=1e-6, abs_tol=1e-9):
            return False
    return len({len(one.per_case) for one in seeds if one.per_case is not None}) == 1


def is_geometric(seeds: list[Score]) -> bool:
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
    scores: dict[tuple[str, str], list[Score]],
    resamples: int,
    level: float,
    margin: float = 0.0,
) -> Difference:
    """Compare two rows by a score: in pairs of cases where it has them."""
    how: dict[str, Any] = {"margin": margin, "resamples": resamples, "level": level}
    first, second = (scores[row, name] for row in rows)
    if is_mean([*first, *second]):
        stacked = (_stacked(first), _stacked(second))
        return paired_difference(name, rows, *stacked, **how)
    if is_geometric(first) and is_geometric(second):
        logs = (np.log(_stacked(first)), np.log(_stacked(second)))
        return replace(paired_difference(name, rows, *logs, **how), log=True)
    ends = [[Estimate(one.value, one.low, one.high) for one in row] for row in (first, second)]
    return set_difference(name, rows, *ends, margin=margin)


def changes(before: Cell | None, cell: Cell) -> list[tuple[str, str, str]]:
    """Return (key, old, new) of what a row sets otherwise than another one, sampling included."""
    if before is None:
        return []
    old, new = settings_of(before), settings_of(cell)
    return [(key, _text(old.get(key)), _text(value)) for key, value in new.items() if old.get(key) != value]


def settings_of(cell: Cell) -> dict[str, Any]:
    """Return all settings of a row that shape its results, by dotted key."""
    values = without_aside(cell.config)
    values["cache"] = {"variants": cell.config.cache.variants}
    start = cell.row.start or "random weights"
    return {"start": start, **_flat(values), **_flat({"sampling": vars(cell.row.sampling)})}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
