"""Differences between rows of an ablation: paired over cases and seeds, and what they do not decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from pbe.errors import UserError
from pbe.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Estimate, resample_counts

UNDECIDED = "undecided"


def case_interval(
    values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Estimate:
    """Return the mean of ``(seeds, cases)`` values with a percentile bootstrap interval over the cases.

    The same cases are drawn for all seeds. The interval says nothing of other trainings; that is what
    :func:`seed_margin` adds. Given differences of pairs it is the paired bootstrap.

    Args:
        values: float ``(s, n)``; a case with a value that is not finite is left out for all seeds.
        seed: of the resampling.
        resamples: number of bootstrap samples.
        level: share that the interval holds.
    """
    values = values[:, np.isfinite(values).all(axis=0)]
    cases = values.shape[1]
    if not cases:
        raise UserError("no case has a finite value in every seed; nothing can be compared")
    replicates = resample_counts(cases, resamples, seed) @ values.mean(axis=0) / cases
    low, high = np.quantile(replicates, [(1.0 - level) / 2, (1.0 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def seed_margin(groups: Sequence[np.ndarray], *, level: float = LEVEL, most: int | None = None) -> float:
    """Return half the width that chance between trainings adds to the interval of a mean over seeds.

    Two or three seeds say little of how much a training varies, so that their own deviation would often
    be far too small by luck. It is pooled over all rows (or all compared pairs), which are taken to
    vary alike, and stands in Student's t with the degrees of freedom of the pool.

    Args:
        groups: the values ``(s,)`` of each seed, for every row or pair; those not finite are left out.
        level: share that the interval is to hold.
        most: independent groups there can be; pairs of the same rows are not all independent.

    Returns:
        0 with one seed, which says nothing of other trainings.
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
        verdict: ``higher`` or ``lower`` (of the second), or ``undecided``.
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
    """Compare two rows case by case and seed by seed.

    Args:
        metric: name of the score.
        names: of the rows.
        first: ``(seeds, cases)`` of the first row.
        second: the same of the second; equal seeds and cases stand in equal places.
        margin: what chance between trainings adds; see :func:`seed_margin`.
        resamples: of the bootstrap.
        level: of the interval; a difference is decided when it does not hold 0.
    """
    values = difference_of(first, second)
    estimate = widened(case_interval(values, resamples=resamples, level=level), margin)
    return Difference(metric, *names, estimate.value, estimate.low, estimate.high, _verdict(estimate), True)


def difference_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return ``second - first``; equal infinite values differ by nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(first == second, 0.0, second - first)


def _verdict(estimate: Estimate) -> str:
    return "higher" if estimate.low > 0.0 else "lower" if estimate.high < 0.0 else UNDECIDED


def set_difference(
    metric: str,
    names: tuple[str, str],
    first: list[Estimate],
    second: list[Estimate],
    *,
    margin: float = 0.0,
) -> Difference:
    """Compare two rows by a score of whole sets, which has no cases to pair.

    The half-widths of both rows' own intervals (means over the seeds, which share their cases) and the
    margin are taken as independent, which pairs are not: the interval is wider than a paired one.

    Args:
        metric: name of the score.
        names: of the rows.
        first: the first row's score of each seed.
        second: the second row's.
        margin: what chance between trainings adds; see :func:`seed_margin`.
    """
    ends = np.array([[[one.value, one.low, one.high] for one in row] for row in (first, second)])
    means = ends[:, :, 0].mean(axis=1)
    value = float(difference_of(means[0], means[1]))
    if not np.isfinite(ends).all():
        verdict = UNDECIDED if value == 0.0 or math.isnan(value) else "higher" if value > 0.0 else "lower"
        return Difference(metric, *names, value, math.nan, math.nan, verdict, False)
    half = float(np.linalg.norm((ends[:, :, 2] - ends[:, :, 1]).mean(axis=1) / 2))
    found = widened(Estimate(value, value - half, value + half), margin)
    return Difference(metric, *names, found.value, found.low, found.high, _verdict(found), False)
