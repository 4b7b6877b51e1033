from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import hypergeom
from sklearn.metrics import roc_auc_score, top_k_accuracy_score
from sklearn.metrics.pairwise import cosine_similarity

from pbe.errors import UserError
from pbe.evaluation.metrics.bootstrap import (
    auc,
    auc_interval,
    cosine,
    derangement,
    first_of,
    mean_interval,
    others,
    win_rate,
)

scores = st.lists(st.integers(-5, 5), min_size=1, max_size=40)  # few values, hence many ties


@settings(max_examples=60, deadline=None)
@given(scores, scores)
def test_auc_is_scikit_learns(positive, negative):
    truth = [1] * len(positive) + [0] * len(negative)
    expected = roc_auc_score(truth, positive + negative)
    assert auc(np.array(positive, float), np.array(negative, float)) == pytest.approx(expected, abs=1e-12)


def test_auc_of_separated_and_equal_scores():
    low, high = np.zeros(4), np.ones(4)
    assert (auc(high, low), auc(low, high), auc(low, low)) == (1.0, 0.0, 0.5)


def test_win_rate_by_hand():
    positive, negative = np.array([3.0, 1.0, 2.0, 5.0]), np.array([1.0, 2.0, 2.0, 0.0])
    estimate = win_rate(positive, negative)
    assert estimate.value == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert 0.0 <= estimate.low < estimate.value < estimate.high <= 1.0


def test_win_rate_interval_is_the_binomial_one():
    won = np.arange(400) < 280
    estimate = win_rate(won.astype(float), 1.0 - won)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 400)
    assert estimate.value == pytest.approx(0.7)
    assert (estimate.low, estimate.high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.1 * half)


def test_cosine_by_hand_and_refusal():
    a, b = np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([[1.0, 1.0], [-6.0, -8.0]])
    assert cosine(a, b) == pytest.approx([np.sqrt(0.5), -1.0])
    with pytest.raises(UserError, match="1 of 2 feature vectors"):
        cosine(np.array([[0.0, 0.0], [1.0, 0.0]]), b)
    with pytest.raises(UserError, match="1 of 2"):
        cosine(np.array([[np.nan, 0.0], [1.0, 0.0]]), b)


@pytest.mark.parametrize("n", [2, 3, 7, 181])
def test_derangement_has_no_fixed_point(n):
    partner = derangement(n, 5, "x")
    assert sorted(partner) == list(range(n))
    assert not np.any(partner == np.arange(n))
    assert np.array_equal(partner, derangement(n, 5, "x"))


def test_derangement_of_one_is_refused():
    with pytest.raises(UserError, match="at least two"):
        derangement(1, 0)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    estimate = mean_interval(values, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_of_the_auc_resamples_pairs():
    """The fast replicates equal the AUC recomputed on the very same resamples."""
    from pbe.evaluation.metrics.bootstrap import resample_counts

    rng = np.random.default_rng(2)
    positive, negative = rng.normal(0.5, 1, 12), rng.normal(0, 1, 12)
    counts = resample_counts(12, 50, 0).astype(int)
    slow = [auc(np.repeat(positive, c), np.repeat(negative, c)) for c in counts]
    estimate = auc_interval(positive, negative, seed=0, resamples=50)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))


def test_bootstrap_intervals_cover_the_truth():
    """Scores N(1, 1) and N(0, 1), correlated within a pair: the true AUC is Phi(1 / sqrt 2) = 0.7602."""
    rng, hits, trials = np.random.default_rng(7), 0, 200
    for _ in range(trials):
        shared = rng.normal(0, np.sqrt(0.5), 80)
        positive = 1.0 + shared + rng.normal(0, np.sqrt(0.5), 80)
        negative = shared + rng.normal(0, np.sqrt(0.5), 80)
        estimate = auc_interval(positive, negative, resamples=400)
        hits += estimate.low <= 0.76025 <= estimate.high
    # 95 % nominal; three standard deviations of 200 trials, and the percentile method's known shortfall
    assert 0.88 <= hits / trials <= 0.995


@pytest.mark.parametrize(("n", "choice"), [(20, 20), (21, 20), (181, 20), (2, 2)])
def test_others_are_distinct_and_never_the_object_itself(n, choice):
    drawn = others(n, choice)
    assert drawn.shape == (n, choice - 1)
    assert drawn.min() >= 0
    assert drawn.max() < n
    assert all(len(set(row) | {i}) == choice for i, row in enumerate(drawn.tolist()))
    assert np.array_equal(drawn, others(n, choice))


def test_others_are_drawn_evenly():
    """Each of 60 objects is among the 19 others of a further one with the chance 19 / 59."""
    counts = np.bincount(others(60).ravel(), minlength=60)
    spread = np.sqrt(59 * (19 / 59) * (40 / 59))
    assert counts.mean() == 19.0
    assert np.abs(counts - 19.0).max() < 4.0 * spread


def paired_features(n: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    exemplars = rng.normal(size=(n, 12))
    return exemplars + noise * rng.normal(size=(n, 12)), exemplars


def test_first_of_twenty_is_scikit_learns_top_one_accuracy():
    regions, exemplars = paired_features(90, 2.0)
    places = np.column_stack([np.arange(90), others(90)])
    table = np.take_along_axis(cosine_similarity(regions, exemplars), places, axis=1)
    expected = top_k_accuracy_score(np.zeros(90, int), table, k=1, labels=np.arange(20))
    assert 0.1 < expected < 0.9
    assert first_of(regions, exemplars).mean() == pytest.approx(expected, abs=1e-12)


def test_first_of_twenty_is_near_its_mean_over_all_draws():
    """With w of n - 1 others further away, all 19 drawn ones are with C(w, 19) / C(n - 1, 19)."""
    regions, exemplars = paired_features(600, 2.0)
    table = cosine_similarity(regions, exemplars)
    further = np.sum(table < np.diagonal(table)[:, None], axis=1)
    chance = hypergeom(599, further, 19).pmf(19)
    error = np.sqrt(np.sum(chance * (1.0 - chance))) / 600
    assert first_of(regions, exemplars).mean() == pytest.approx(chance.mean(), abs=3.0 * error)


def test_first_of_twenty_at_its_ends_and_with_ties():
    _, exemplars = paired_features(40, 0.0)
    assert first_of(3.0 * exemplars, exemplars).tolist() == [1.0] * 40
    assert first_of(-exemplars, exemplars).tolist() == [0.0] * 40
    same = np.ones((40, 3))
    assert first_of(same, same) == pytest.approx([1 / 20] * 40)  # nothing tells them apart


def test_fewer_objects_than_the_choice_are_refused():
    with pytest.raises(UserError, match="one of 20 needs at least 20 objects, not 19"):
        first_of(np.ones((19, 2)), np.ones((19, 2)))
