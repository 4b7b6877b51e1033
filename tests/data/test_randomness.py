"""Counter-based randomness."""

from __future__ import annotations

import numpy as np
import pytest

from pbe.data.randomness import generator, permutation, shuffled


def test_same_key_same_draws_whatever_came_before():
    first = generator(1, "sample", 2).random(5)
    generator(9).random(100)
    np.testing.assert_array_equal(first, generator(1, "sample", 2).random(5))


@pytest.mark.parametrize(
    "other", [(1, 23), (12, 3, ""), ("1", 2, 3), (1, 2, "3"), (1, 2), (3, 2, 1), (1, -2, 3), ("1,2,3",)]
)
def test_similar_keys_differ(other):
    assert generator(1, 2, 3).random() != generator(*other).random()


def test_encoding_is_unambiguous():
    assert generator("a", "b").random() != generator("ab").random()
    assert generator("ai1:1").random() != generator("a", 1).random()


def test_stable_across_versions():
    """A change of these values would change every data set order and sample."""
    assert generator(23, "order", 0).integers(1000, size=4).tolist() == [790, 491, 529, 401]


def test_numpy_integers_are_integers():
    assert generator(np.int64(7)).random() == generator(7).random()


@pytest.mark.parametrize("bad", [1.0, True, None, b"x", np.float32(1), np.bool_(True)])
def test_other_types_are_refused(bad):
    with pytest.raises(TypeError, match="integer or a string"):
        generator(1, bad)


def test_empty_key_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        generator()


def test_permutation():
    order = permutation(100, 3, "order", 1)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(100))
    assert order.tolist() == permutation(100, 3, "order", 1).tolist()
    assert order.tolist() != permutation(100, 3, "order", 2).tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def test_shuffled_is_a_permutation(n):
    assert sorted(shuffled(position, n, 3, "x") for position in range(n)) == list(range(n))


def test_shuffled_looks_random_and_depends_on_the_key():
    n = 400
    orders = {key: [shuffled(position, n, key) for position in range(n)] for key in range(40)}
    assert len({tuple(order) for order in orders.values()}) == 40
    places = np.array(list(orders.values()))
    correlations = [np.corrcoef(order, np.arange(n))[0, 1] for order in places]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(n * 40)
    assert np.abs(places.mean(axis=0) - (n - 1) / 2).max() < 5 * n / np.sqrt(12 * 40)


def test_shuffled_of_very_many():
    n = 16_000_000
    places = [shuffled(position, n, "boxes") for position in range(2000)]
    assert len(set(places)) == 2000
    assert np.histogram(places, 10, (0, n))[0] == pytest.approx(200, abs=60)
    assert [shuffled(position, n, "boxes") for position in (5, 0)] == [places[5], places[0]]


@pytest.mark.parametrize("position", [-1, 10])
def test_shuffled_checks_its_position(position):
    with pytest.raises(ValueError, match="not within"):
        shuffled(position, 10, 1)
