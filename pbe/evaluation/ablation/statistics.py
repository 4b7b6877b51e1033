"""Differences between rows of an ablation: paired over cases and seeds, and what they do not decide."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pbe.data.randomness import generator
from pbe.errors import UserError
from pbe.evaluation.estimates import LEVEL, RESAMPLES, Estimate, resample_counts

UNDECIDED = "undecided"


def hierarchical_interval(
    values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Estimate:
    """Return the mean of ``(seeds, cases)`` values with a bootstrap interval over both.

    Cases and seeds are drawn with replacement, the same cases for all seeds. Drawn from s seeds, means vary
    by a factor (s - 1) / s too little; their deviations are widened accordingly. One seed is not drawn:
    the interval then says nothing of other trainings. Given differences of pairs it is the paired bootstrap.

    Args:
        values: float ``(s, n)``; a case with a value that is not finite is left out for all seeds.
        seed: of the resampling.
        resamples: number of bootstrap samples.
        level: share that the interval holds.

    Raises:
        UserError: no case is left.
    """
    values = values[:, np.isfinite(values).all(axis=0)]
    seeds, cases = values.shape
    if not cases:
        raise UserError("no case has a finite value in every seed; nothing can be compared")
    by_seed = resample_counts(cases, resamples, seed) @ values.T / cases  # resamples, seeds
    replicates = by_seed.mean(axis=1)
    if seeds > 1:
        rng = generator(seed, "bootstrap-seeds", seeds, resamples)
        drawn = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples) / seeds
        deviation = (drawn * by_seed).sum(axis=1) - replicates
        replicates = replicates + math.sqrt(seeds / (seeds - 1)) * deviation
    low, high = np.quantile(replicates, [(1.0 - level) / 2, (1.0 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """What one row's score is above another's.

    Attributes:
        metric: name of the score.
        first: name of a row.
        second: name of the row that is compared with it.
        value: score of the second minus that of the first.
        low: lower end of the interval.
        high: upper end; both NaN for scores of whole sets, which have no cases to pair.
        verdict: ``higher`` or ``lower`` (of the second), or ``undecided``.
        paired: whether it comes from pairs of cases.
        log: whether it is one of natural logarithms, for scores that are geometric means of their cases.
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
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """Compare two rows case by case and seed by seed.

    Args:
        metric: name of the score.
        names: of the rows.
        first: ``(seeds, cases)`` of the first row.
        second: the same of the second; equal seeds and cases stand in equal places.
        resamples: of the bootstrap.
        level: of the interval; a difference is decided when it does not hold 0.
    """
    with np.errstate(invalid="ignore"):
        values = np.where(first == second, 0.0, second - first)  # equal infinite values differ by nothing
    estimate = hierarchical_interval(values, resamples=resamples, level=level)
    verdict = "higher" if estimate.low > 0.0 else "lower" if estimate.high < 0.0 else UNDECIDED
    return Difference(metric, *names, estimate.value, estimate.low, estimate.high, verdict, True)


def set_difference(
    metric: str, names: tuple[str, str], first: list[Estimate], second: list[Estimate]
) -> Difference:
    """Compare two rows by a score of whole sets: decided only where no interval of a seed meets another's.

    Args:
        metric: name of the score.
        names: of the rows.
        first: the first row's score of each seed.
        second: the second row's.
    """
    means = [float(np.mean([one.value for one in row])) for row in (first, second)]
    value = 0.0 if means[0] == means[1] else means[1] - means[0]  # both may be infinite
    verdict = UNDECIDED
    if min(one.low for one in second) > max(one.high for one in first):
        verdict = "higher"
    elif max(one.high for one in second) < min(one.low for one in first):
        verdict = "lower"
    return Difference(metric, *names, value, math.nan, math.nan, verdict, False)
