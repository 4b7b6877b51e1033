"""Similarities of features, areas under the curve, and bootstrap intervals, in plain numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pbe.data.randomness import generator, permutation
from pbe.errors import UserError

RESAMPLES = 2000
LEVEL = 0.95
CHOICE = 20  # exemplars that a painted region is laid before: its own and 19 others


@dataclass(frozen=True)
class Estimate:
    """A score with its bootstrap interval (percentile method) from ``low`` to ``high``."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Show three decimals, such as ``0.812 (0.780 to 0.841)``."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        seed: of the resampling.
        level: of the intervals, in (0, 1).
        resamples: for means over cases, at least 1.
        set_resamples: for scores of whole sets, each of which is a distance anew; at least 2.
    """

    seed: int = 0
    level: float = LEVEL
    resamples: int = RESAMPLES
    set_resamples: int = 50

    def __post_init__(self) -> None:
        """Refuse what gives no interval."""
        if not 0.0 < self.level < 1.0:
            raise UserError(f"the level of an interval must lie between 0 and 1, not {self.level}")
        if self.resamples < 1 or self.set_resamples < 2:
            raise UserError(
                f"the bootstrap takes at least 1 resample of cases and 2 of sets, not {self.resamples} and "
                f"{self.set_resamples}"
            )

    def of_mean(self, values: np.ndarray) -> Estimate:
        """Return the mean of ``(n,)`` finite values with its percentile interval."""
        return mean_interval(values, seed=self.seed, resamples=self.resamples, level=self.level)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosines of matching rows, ``(n,)`` float64; NaN where a row is zero or not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.sum(a * b, axis=1) / np.where(lengths > 0.0, lengths, np.nan)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return :func:`cosines` of features of which none may be zero or not finite; a UserError if one is."""
    found = cosines(a, b)
    bad = int(np.sum(~np.isfinite(found)))
    if bad:
        raise UserError(f"{bad} of {len(found)} feature vectors are zero or not finite; check the images")
    return found


def derangement(n: int, *key: int | str) -> np.ndarray:
    """Return a permutation of ``0 .. n-1`` without fixed points, int64 ``(n,)``, that belongs to ``key``.

    It follows one random cycle through all of them, so no place keeps its own.
    """
    if n < 2:
        raise UserError(f"shuffled exemplars need at least two objects, not {n}")
    cycle = permutation(n, *key)
    result = np.empty(n, np.int64)
    result[cycle] = np.roll(cycle, -1)
    return result


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the chance that a positive exceeds a negative, ties counting half (Mann-Whitney).

    Every one of the ``(n,)`` positives meets every one of the ``(m,)`` negatives.
    """
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    up_to = np.searchsorted(ordered, positive, side="right")
    return float((below + up_to).sum() / (2 * len(positive) * len(negative)))


def others(n: int, choice: int = CHOICE) -> np.ndarray:
    """Return the other objects that each of ``n`` is laid beside, int64 ``(n, choice - 1)``.

    They are drawn without replacement. The draw belongs to the place and to ``n`` alone, to no seed.
    """
    if n < choice:
        raise UserError(f"one of {choice} needs at least {choice} objects, not {n}")
    drawn = [generator("first-of", choice, i).choice(n - 1, choice - 1, replace=False) for i in range(n)]
    places = np.stack(drawn).astype(np.int64)
    return places + (places >= np.arange(n)[:, None])  # an object is not among its own others


def first_of(regions: np.ndarray, exemplars: np.ndarray, choice: int = CHOICE) -> np.ndarray:
    """Return whether each region resembles its own exemplar more than those of :func:`others`, ``(n,)``.

    A value is 1 where it does and 0 where it does not; where the own exemplar ties with k others for the
    first place it is 1 / (k + 1), so that chance is ``1 / choice`` whatever the ties. The features ``(n, d)``
    are in the order of the benchmark's numbers.
    """
    drawn = others(len(regions), choice)
    own = cosine(regions, exemplars)
    other = np.stack([cosine(regions, exemplars[column]) for column in drawn.T], axis=1)
    ties = np.sum(other == own[:, None], axis=1)
    return np.where(np.any(other > own[:, None], axis=1), 0.0, 1.0 / (ties + 1))


def resample_counts(n: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each bootstrap sample draws each of ``n`` objects, float64 ``(resamples, n)``."""
    rng = generator(seed, "bootstrap", n, resamples)
    return rng.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


def _interval(value: float, replicates: np.ndarray, level: float) -> Estimate:
    low, high = np.quantile(replicates, [(1.0 - level) / 2, (1.0 + level) / 2])
    return Estimate(float(value), float(low), float(high))


def auc_interval(
    positive: np.ndarray,
    negative: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Estimate:
    """Return :func:`auc` of ``(n,)`` positives and negatives with a bootstrap interval over objects.

    Object i brings ``positive[i]`` and ``negative[i]`` into a resample together, since both come from
    the same scene, mask and noise.
    """
    n = len(positive)
    wins = (positive[:, None] > negative[None, :]) + 0.5 * (positive[:, None] == negative[None, :])
    counts = resample_counts(n, resamples, seed)
    replicates = np.sum((counts @ wins) * counts, axis=1) / n**2
    return _interval(auc(positive, negative), replicates, level)


def mean_interval(
    values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Estimate:
    """Return the mean of ``(n,)`` values with a bootstrap interval over them.

    Given differences of paired scores it is the paired bootstrap.
    """
    replicates = resample_counts(len(values), resamples, seed) @ values / len(values)
    return _interval(float(np.mean(values)), replicates, level)


def win_rate(positive: np.ndarray, negative: np.ndarray, *, seed: int = 0) -> Estimate:
    """Return the share of pairs ``(positive[i], negative[i])`` won by the positive, with its interval.

    A tie counts half.
    """
    return mean_interval((positive > negative) + 0.5 * (positive == negative), seed=seed)
