"""Paired intervals over cases and seeds, on numbers whose answer is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from pbe.errors import UserError
from pbe.evaluation.ablation.results import (
    UNDECIDED,
    case_interval,
    paired_difference,
    seed_margin,
    set_difference,
)
from pbe.evaluation.metrics.bootstrap import Estimate, mean_interval

ROWS = ("a", "b")


def test_one_seed_is_the_bootstrap_over_cases() -> None:
    values = np.random.default_rng(0).normal(size=(1, 60))
    assert case_interval(values) == mean_interval(values[0])


def test_case_noise_gives_the_interval_of_the_mean() -> None:
    # every seed says the same: the deviation of the mean is that of the cases, 1 / sqrt(n)
    values = np.tile(np.random.default_rng(1).normal(size=400), (3, 1))
    found = case_interval(values, resamples=20_000)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values[0].std() / 20, rel=0.05)


def test_the_margin_of_one_row_is_students_interval() -> None:
    seeds = np.array([0.3, 0.5, 0.1, 0.9])
    low, high = scipy.stats.t.interval(0.95, 3, loc=seeds.mean(), scale=scipy.stats.sem(seeds))
    assert seed_margin([seeds]) == pytest.approx((high - low) / 2)


def test_the_margin_pools_rows_and_counts_no_more_freedom_than_there_is() -> None:
    groups = [np.array([0.0, 2.0]), np.array([5.0, 5.0]), np.array([math.inf, math.inf])]
    # variances 2 and 0; the infinite one is left out
    assert seed_margin(groups) == pytest.approx(scipy.stats.t.ppf(0.975, 2) * math.sqrt(1.0 / 2))
    assert seed_margin(groups, most=1) == pytest.approx(scipy.stats.t.ppf(0.975, 1) * math.sqrt(1.0 / 2))
    assert seed_margin([np.array([1.0])]) == 0.0
    assert seed_margin([]) == 0.0


@pytest.mark.parametrize("ratio", [0.0, 1.0, 5.0])
def test_rows_that_differ_by_chance_are_rarely_decided(ratio: float) -> None:
    """Five rows of two seeds; ``ratio`` is the deviation of trainings over that of the mean over cases."""
    rng = np.random.default_rng(7)
    decided = []
    for _ in range(150):
        hard = rng.normal(size=60)
        rows = [
            hard + rng.normal(size=(2, 60)) + rng.normal(scale=ratio / math.sqrt(60), size=(2, 1))
            for _ in range(5)
        ]
        pairs = list(itertools.pairwise(rows))
        margin = seed_margin([(b - a).mean(axis=1) for a, b in pairs], most=4)
        found = [paired_difference("m", ROWS, a, b, margin=margin, resamples=200) for a, b in pairs]
        decided += [one.verdict != UNDECIDED for one in found]
    assert np.mean(decided) < 0.09


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
    margin = seed_margin([second.mean(axis=1)])
    assert paired_difference("m", ROWS, first, second, margin=margin).verdict == UNDECIDED


def test_cases_without_a_value_are_left_out_and_exact_ones_are_equal() -> None:
    first = np.array([[1.0, math.nan, 3.0, math.inf]])
    second = np.array([[2.0, 5.0, 4.0, math.inf]])
    assert paired_difference("m", ROWS, first, second).value == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="no case"):
        paired_difference("m", ROWS, np.full((1, 2), math.nan), second[:, :2])


def test_scores_of_sets_are_decided_where_their_widths_and_the_margin_leave_no_doubt() -> None:
    low = [Estimate(1.0, 0.9, 1.1), Estimate(1.2, 1.1, 1.3)]
    high = [Estimate(2.0, 1.9, 2.1), Estimate(1.6, 1.5, 1.7)]
    found = set_difference("fd", ROWS, low, high)
    assert found.value == pytest.approx(0.7)
    assert (found.verdict, found.paired) == ("higher", False)
    assert found.high - found.low == pytest.approx(2 * math.hypot(0.1, 0.1))
    assert set_difference("fd", ROWS, high, low).verdict == "lower"
    assert set_difference("fd", ROWS, low, high, margin=1.0).verdict == UNDECIDED
    wide = [Estimate(2.0, 0.9, 3.1), Estimate(1.6, 0.5, 2.7)]
    assert set_difference("fd", ROWS, low, wide).verdict == UNDECIDED


def test_exact_scores_are_told_from_finite_ones_and_not_from_each_other() -> None:
    exact = [Estimate(math.inf, math.inf, math.inf)] * 2
    finite = [Estimate(40.0, 39.0, 41.0)] * 2
    assert set_difference("psnr", ROWS, exact, exact).verdict == UNDECIDED
    assert set_difference("psnr", ROWS, exact, exact).value == 0.0
    assert set_difference("psnr", ROWS, finite, exact).verdict == "higher"
    assert set_difference("psnr", ROWS, exact, finite).verdict == "lower"
