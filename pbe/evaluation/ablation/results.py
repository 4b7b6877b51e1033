"""What the rows of an ablation scored: values over cases and seeds, their intervals and their differences.

Differences are paired over cases and seeds; what their interval does not decide is called undecided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from pbe.config.fields import flatten
from pbe.errors import UserError
from pbe.evaluation.ablation.config import Ablation
from pbe.evaluation.ablation.measuring import read_scores
from pbe.evaluation.ablation.plan import PICTURES, Cell, Plan
from pbe.evaluation.ablation.stages import without_aside
from pbe.evaluation.metrics.base import Score, json_number
from pbe.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Estimate, mean_interval

UNDECIDED = "undecided"


def case_interval(
    values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Estimate:
    """Return the mean of ``(seeds, cases)`` values with a percentile bootstrap interval over the cases.

    The same cases are drawn for all seeds, without those that have a value that is not finite. The interval
    says nothing of other trainings; that is what :func:`seed_margin` adds. Given differences of pairs it is
    the paired bootstrap.
    """
    values = values[:, np.isfinite(values).all(axis=0)]
    if not values.shape[1]:
        raise UserError("no case has a finite value in every seed; nothing can be compared")
    found = mean_interval(values.mean(axis=0), seed=seed, resamples=resamples, level=level)
    return replace(found, value=float(values.mean()))


def seed_margin(groups: Sequence[np.ndarray], *, level: float = LEVEL, most: int | None = None) -> float:
    """Return half the width that chance between trainings adds to the interval of a mean over seeds.

    Two or three seeds say little of how much a training varies, so that their own deviation would often
    be far too small by luck. It is pooled over all rows (or all compared pairs), which are taken to
    vary alike, and stands in Student's t with the degrees of freedom of the pool. One seed says nothing of
    other trainings: 0.

    Args:
        groups: the values ``(s,)`` of each seed, for every row or pair; those not finite are left out.
        level: share that the interval is to hold.
        most: independent groups there can be; pairs of the same rows are not all independent.
    """
    kept = [group for group in groups if np.isfinite(group).all()]
    seeds = len(kept[0]) if kept else 0
    if seeds < 2:
        return 0.0
    variance = float(np.mean([group.var(ddof=1) for group in kept]))
    freedom = min(len(kept), most or len(kept)) * (seeds - 1)
    return float(student_t.ppf((1.0 + level) / 2, freedom)) * math.sqrt(variance / seeds)


def widened(estimate: Estimate, margin: float) -> Estimate:
    """Return an estimate whose ends are moved outwards by an independent margin."""
    value, low, high = estimate.value, estimate.low, estimate.high
    return Estimate(value, value - math.hypot(value - low, margin), value + math.hypot(high - value, margin))


@dataclass(frozen=True)
class Difference:
    """What the score of row ``second`` is above that of row ``first``.

    Attributes:
        metric: name of the score.
        first: name of a row.
        second: name of the row that is compared with it.
        value: difference, of natural logarithms with ``log``.
        low: lower end of the interval.
        high: upper end; both NaN where a score is infinite.
        verdict: ``higher`` or ``lower`` (of the second), or ``undecided``: the interval holds 0.
        paired: whether it comes from pairs of cases.
        log: whether the score is a geometric mean of its cases.
    """

    metric: str
    first: str
    second: str
    value: float
    low: float
    high: float
    verdict: str
    paired: bool
    log: bool = False


def paired_difference(
    metric: str,
    names: tuple[str, str],
    first: np.ndarray,
    second: np.ndarray,
    *,
    margin: float = 0.0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """Compare two rows, each ``(seeds, cases)``, case by case and seed by seed.

    ``margin`` is what chance between trainings adds; see :func:`seed_margin`.
    """
    estimate = case_interval(difference_of(first, second), resamples=resamples, level=level)
    return _judged(metric, names, widened(estimate, margin), paired=True)


def difference_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return ``second - first``; equal infinite values differ by nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(first == second, 0.0, second - first)


def _judged(metric: str, names: tuple[str, str], estimate: Estimate, *, paired: bool) -> Difference:
    verdict = "higher" if estimate.low > 0.0 else "lower" if estimate.high < 0.0 else UNDECIDED
    return Difference(metric, *names, estimate.value, estimate.low, estimate.high, verdict, paired)


def set_difference(
    metric: str,
    names: tuple[str, str],
    first: Sequence[Estimate | Score],
    second: Sequence[Estimate | Score],
    *,
    margin: float = 0.0,
) -> Difference:
    """Compare two rows by a score of whole sets, given for each seed, which has no cases to pair.

    The half-widths of both rows' own intervals (means over the seeds, which share their cases) and the
    margin are taken as independent, which pairs are not: the interval is wider than a paired one.
    """
    ends = np.array([[[one.value, one.low, one.high] for one in row] for row in (first, second)])
    means = ends[:, :, 0].mean(axis=1)
    value = float(difference_of(means[0], means[1]))
    if not np.isfinite(ends).all():
        verdict = UNDECIDED if value == 0.0 or math.isnan(value) else "higher" if value > 0.0 else "lower"
        return Difference(metric, *names, value, math.nan, math.nan, verdict, False)
    half = float(np.linalg.norm((ends[:, :, 2] - ends[:, :, 1]).mean(axis=1) / 2))
    found = widened(Estimate(value, value - half, value + half), margin)
    return _judged(metric, names, found, paired=False)


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
    return {key: json_number(each) if isinstance(each, float) else each for key, each in values.items()}


def gather(ablation: Ablation, plan: Plan) -> Results:
    """Read the scores of all cells and compare the rows."""
    rows = [row.name for row in ablation.rows]
    read = {row: [read_scores(cell.scores.folder) for cell in plan.of(row)] for row in rows}
    every = [scores for cells in read.values() for scores in cells]
    names = list(every[0])
    if any(list(scores) != names for scores in every):
        raise UserError("the rows were not scored alike; delete the folder 'scores' of the workspace")
    ran = [name for name in names if all(not math.isnan(scores[name].value) for scores in every)]
    scores = {(row, name): [one[name] for one in cells] for row, cells in read.items() for name in names}
    options = ablation.config.evaluation
    resamples, level = options.resamples, options.level
    estimates: dict[tuple[str, str], Estimate] = {}
    for name in ran:
        margin = seed_margin([seed_values(scores[row, name]) for row in rows], level=level)
        for row in rows:
            estimates[row, name] = estimate_of(scores[row, name], resamples, level, margin)
    pairs = [(first, second) for first, second in ablation.config.comparisons]
    margins = {name: pair_margin(name, pairs, scores, level) for name in ran}
    differences = [
        compare(name, pair, scores, resamples, level, margins[name]) for pair in pairs for name in ran
    ]
    whys = {name: [one[name].why_not for one in every if one[name].why_not] for name in names}
    absent = tuple((name, [*whys[name], "not a number"][0]) for name in names if name not in ran)
    metrics = tuple((name, every[0][name].family, every[0][name].better) for name in ran)
    return Results(ablation, plan, scores, metrics, estimates, tuple(differences), absent)


def case_values(seeds: Sequence[Score]) -> tuple[np.ndarray | None, bool]:
    """Return the ``(seeds, cases)`` values whose mean a score is, so that cases can be drawn and paired.

    The second value says whether they are logarithms, of a geometric mean. None: it is no mean of cases.
    """
    values, means = [one.per_case for one in seeds if one.per_case is not None], [one.value for one in seeds]
    if len(values) == len(seeds) and _are_means(values, means):
        return np.stack(values), False
    if len(values) == len(seeds) and all(mean > 0.0 for mean in means):
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = [np.log(each) for each in values]
        if _are_means(logs, [math.log(mean) for mean in means]):
            return np.stack(logs), True
    return None, False


def _are_means(values: Sequence[np.ndarray], means: Sequence[float]) -> bool:
    for each, mean in zip(values, means, strict=True):
        kept = each[np.isfinite(each)]
        if not (math.isfinite(mean) and len(kept)):
            return False
        if not math.isclose(float(kept.mean()), mean, rel_tol=1e-6, abs_tol=1e-9):
            return False
    return len({len(each) for each in values}) == 1


def seed_values(seeds: Sequence[Score]) -> np.ndarray:
    """Return a row's value of each seed, ``(s,)``; logarithms of geometric means."""
    values = np.array([one.value for one in seeds])
    return np.log(values) if case_values(seeds)[1] else values


def pair_margin(
    name: str, pairs: list[tuple[str, str]], scores: dict[tuple[str, str], list[Score]], level: float
) -> float:
    """Return what chance between trainings adds to the interval of a score's differences.

    Pairs of r rows have r - 1 independent differences at most.
    """
    groups = [difference_of(*(seed_values(scores[row, name]) for row in pair)) for pair in pairs]
    return seed_margin(groups, level=level, most=max(len({row for pair in pairs for row in pair}) - 1, 1))


def estimate_of(seeds: Sequence[Score], resamples: int, level: float, margin: float = 0.0) -> Estimate:
    """Return a row's score over its seeds: their mean, with an interval over cases and trainings.

    Scores of whole sets, and those whose value is not the mean of its cases, have no cases to draw: theirs
    has the mean width of the seeds' own intervals. ``margin`` is what chance between trainings adds, in
    logarithms for geometric means.
    """
    cases, log = case_values(seeds)
    if cases is not None:
        found = widened(case_interval(cases, resamples=resamples, level=level), margin)
        return Estimate(*(math.exp(end) for end in (found.value, found.low, found.high))) if log else found
    ends = ([getattr(one, end) for one in seeds] for end in ("value", "low", "high"))
    means = Estimate(*(float(np.mean(each)) for each in ends))
    return widened(means, margin) if math.isfinite(means.value) else means


def compare(
    name: str,
    rows: tuple[str, str],
    scores: dict[tuple[str, str], list[Score]],
    resamples: int,
    level: float,
    margin: float = 0.0,
) -> Difference:
    """Compare two rows by a score: in pairs of cases where it has them."""
    first, second = (scores[row, name] for row in rows)
    (a, log), (b, other_log) = case_values(first), case_values(second)
    if a is None or b is None or log != other_log or a.shape != b.shape:
        return set_difference(name, rows, first, second, margin=margin)
    found = paired_difference(name, rows, a, b, margin=margin, resamples=resamples, level=level)
    return replace(found, log=log)


def changes(before: Cell | None, cell: Cell) -> list[tuple[str, str, str]]:
    """Return (key, old, new) of what a row sets otherwise than another one, sampling included."""
    if before is None:
        return []
    old, new = settings_of(before), settings_of(cell)
    return [(key, _text(old.get(key)), _text(value)) for key, value in new.items() if old.get(key) != value]


def settings_of(cell: Cell) -> dict[str, Any]:
    """Return all settings of a row that shape its results, by dotted key."""
    values = without_aside(cell.config) | {"cache": {"variants": cell.config.cache.variants}}
    start = cell.row.start or "random weights"
    return {"start": start, **flatten(values), **flatten({"sampling": vars(cell.row.sampling)})}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
