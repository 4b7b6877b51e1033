"""Paired intervals over cases and seeds, on numbers whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pbe.errors import UserError
from pbe.evaluation.ablation.statistics import (
    UNDECIDED,
    hierarchical_interval,
    paired_difference,
    set_difference,
)
from pbe.evaluation.estimates import Estimate, mean_interval

ROWS = ("a", "b")


def test_one_seed_is_the_bootstrap_over_cases() -> None:
    values = np.random.default_rng(0).normal(size=(1, 60))
    assert hierarchical_interval(values) == mean_interval(values[0])


def test_case_noise_alone_gives_the_interval_of_the_mean() -> None:
    # every seed says the same: the deviation of the mean is that of the cases, 1 / sqrt(n)
    values = np.tile(np.random.default_rng(1).normal(size=400), (3, 1))
    found = hierarchical_interval(values, resamples=20_000)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values[0].std() / 20, rel=0.05)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_seed_noise_alone_gives_the_unbiased_deviation_of_the_mean(seeds: int) -> None:
    # cases say the same: the variance of the mean is that of the seeds, s^2 / k with k - 1 in s^2
    levels = np.arange(seeds, dtype=float)
    values = np.repeat(levels[:, None], 50, axis=1)
    rng = np.random.default_rng(0)
    replicates = []
    for seed in range(400):
        found = hierarchical_interval(values, seed=int(rng.integers(2**31)) + seed, resamples=1, level=0.5)
        replicates.append(found.low)
    assert np.var(replicates) == pytest.approx(levels.var(ddof=1) / seeds, rel=0.25)


def test_what_pairs_share_does_not_hide_a_difference() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(scale=10.0, size=181)  # some cases are far harder than others, for both rows
    first = hard + rng.normal(scale=0.1, size=(2, 181))
    second = hard - 0.2 + rng.normal(scale=0.1, size=(2, 181))
    found = paired_difference("m", ROWS, first, second)
    assert found.verdict == "lower"
    assert found.low < -0.2 < found.high < 0.0
    # turned round, everything changes its sign
    back = paired_difference("m", ("b", "a"), second, first)
    assert (back.verdict, back.value) == ("higher", pytest.approx(-found.value))


def test_a_difference_inside_the_interval_is_undecided() -> None:
    rng = np.random.default_rng(3)
    first = rng.normal(size=(2, 50))
    second = first + rng.normal(scale=1.0, size=(2, 50))
    assert paired_difference("m", ROWS, first, second).verdict == UNDECIDED
    assert paired_difference("m", ROWS, first, first).verdict == UNDECIDED


def test_seeds_that_disagree_leave_the_order_undecided() -> None:
    # over cases alone both seeds would be certain, each of the opposite
    first = np.zeros((2, 100))
    second = np.stack([np.full(100, 1.0), np.full(100, -0.8)])
    assert paired_difference("m", ROWS, first, second).verdict == UNDECIDED


def test_cases_without_a_value_are_left_out_and_exact_ones_are_equal() -> None:
    first = np.array([[1.0, math.nan, 3.0, math.inf]])
    second = np.array([[2.0, 5.0, 4.0, math.inf]])
    assert paired_difference("m", ROWS, first, second).value == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="no case"):
        paired_difference("m", ROWS, np.full((1, 2), math.nan), second[:, :2])


def test_scores_of_sets_are_decided_where_no_interval_meets_another() -> None:
    low = [Estimate(1.0, 0.9, 1.1), Estimate(1.2, 1.1, 1.3)]
    high = [Estimate(2.0, 1.9, 2.1), Estimate(1.6, 1.4, 1.7)]
    wide = [Estimate(2.0, 1.2, 2.1), Estimate(1.6, 1.4, 1.7)]
    assert set_difference("fd", ROWS, low, high).verdict == "higher"
    assert set_difference("fd", ROWS, high, low).verdict == "lower"
    assert set_difference("fd", ROWS, low, wide).verdict == UNDECIDED
    assert set_difference("fd", ROWS, low, high).value == pytest.approx(0.7)
    assert not set_difference("fd", ROWS, low, high).paired
