"""The rows of the toy benchmark against scikit-learn and scikit-image, on made-up features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from pbe.evaluation.benchmark.toy_scores import Scorer, mean_psnr
from pbe.evaluation.metrics.bootstrap import derangement, others

COUNT = 30


@dataclass(frozen=True)
class Shown:
    index: int
    mask: np.ndarray
    exemplar: np.ndarray


class Means:
    """Stands in for the tower: mean and deviation of each channel, of a linear grey the same thrice."""

    def of_pictures(self, pictures, batch_size=64, *, grey=False):
        rows = []
        for picture in pictures:
            values = picture.astype(float)
            if grey:
                values = np.repeat(values @ np.full((3, 1), 1 / 3), 3, axis=2)
            rows.append(np.concatenate([values.mean((0, 1)) - 128.0, values.std((0, 1)) - 40.0]))
        return np.stack(rows)

    def of_regions(self, pictures, masks, batch_size=64, *, grey=False):
        return self.of_pictures(list(pictures), grey=grey)  # the masks are whole


@pytest.fixture(scope="module")
def shown() -> tuple[list[Shown], np.ndarray, np.ndarray]:
    """Cases in a shuffled order, edits that resemble their exemplars somewhat, and some that do not."""
    rng = np.random.default_rng(5)
    tints = rng.normal(0.0, 30.0, (COUNT, 3))

    def images(noise: float) -> np.ndarray:
        tint = tints + rng.normal(0.0, noise, tints.shape)
        pixels = 128.0 + tint[:, None, None] + rng.normal(0.0, 30.0, (COUNT, 6, 6, 3))
        return np.clip(pixels, 0, 255).astype(np.uint8)

    exemplars, mask = images(0.0), np.full((6, 6), 255, np.uint8)
    order = rng.permutation(COUNT)
    cases = [Shown(int(i), mask, exemplar) for i, exemplar in zip(order, exemplars, strict=True)]
    return cases, images(25.0), images(25.0)[::-1].copy()


@pytest.mark.parametrize("grey", [False, True])
def test_a_row_is_scikit_learns(shown, grey):
    cases, own, shuffled = shown
    features = Means()
    scorer = Scorer(cases, features)
    row = scorer.row(scorer.regions(own), scorer.similarity(scorer.regions(shuffled)))
    exemplars = features.of_pictures([case.exemplar for case in cases], grey=grey)
    table = cosine_similarity(features.of_pictures(list(own), grey=grey), exemplars)
    negative = np.diagonal(cosine_similarity(features.of_pictures(list(shuffled), grey=grey), exemplars))
    truth = [1] * COUNT + [0] * COUNT
    expected = roc_auc_score(truth, np.concatenate([np.diagonal(table), negative]))
    found = row.grey_auc if grey else row.auc
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert found.low < found.value < found.high
    order = np.argsort([case.index for case in cases])
    drawn = table[np.ix_(order, order)]
    best = [drawn[i, i] > drawn[i, places].max() for i, places in enumerate(others(COUNT))]
    first = row.grey_first if grey else row.first
    assert first is not None
    assert 0.05 < first.value == pytest.approx(np.mean(best), abs=1e-12)
    assert first.low < first.value < first.high


def test_the_order_of_the_cases_changes_no_value(shown):
    cases, own, shuffled = shown
    rows = []
    for order in (np.arange(COUNT), np.random.default_rng(0).permutation(COUNT)):
        scorer = Scorer([cases[i] for i in order], Means())
        negative = scorer.similarity(scorer.regions(shuffled[order]))
        rows.append(scorer.row(scorer.regions(own[order]), negative))
    one, other = rows
    for name in ("auc", "grey_auc", "first", "grey_first", "similarity", "win_rate"):
        assert getattr(one, name).value == pytest.approx(getattr(other, name).value, abs=1e-12)


def test_negatives_of_true_objects_are_other_exemplars(shown):
    cases, own, _ = shown
    scorer, partner = Scorer(cases, Means()), derangement(COUNT, 0)
    regions = scorer.regions(own)
    exemplars = Means().of_pictures([case.exemplar for case in cases])
    expected = cosine_similarity(Means().of_pictures(list(own)), exemplars)[np.arange(COUNT), partner]
    assert scorer.similarity(regions, partner)[0] == pytest.approx(expected)


def test_psnr_is_scikit_images(shown):
    _, one, other = shown
    pairs = zip(one, other, strict=True)
    expected = np.mean([peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs])
    assert mean_psnr(one, other) == pytest.approx(expected)
