"""Edits of the toy benchmark, and its rows against scikit-learn and scikit-image, on made-up features."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from pbe.errors import UserError
from pbe.evaluation.benchmark.generation import GenerateSettings, at_scales, edit_batch, noise_of
from pbe.evaluation.benchmark.toy import make_edits
from pbe.evaluation.benchmark.toy_run import Scorer, cases_hash, changed_outside, mean_psnr, score_edits
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.bootstrap import derangement, others
from pbe.evaluation.metrics.towers import to_grey
from pbe.evaluation.report import markdown

COUNT = 30
SCALES = (1.0, 4.0)
SETTINGS = GenerateSettings(solver="ddim", steps=2, seed=0, batch_size=4)


@pytest.fixture(scope="module")
def edits(pipe, cases):
    return make_edits(pipe, cases, SCALES, SETTINGS)


def test_shapes_and_background(cases, edits):
    images, masks = np.stack([c.image for c in cases]), np.stack([c.mask for c in cases])
    for pictures in (*edits.own.values(), *edits.shuffled.values()):
        assert pictures.shape == images.shape
        assert pictures.dtype == np.uint8
        assert changed_outside(images, masks, pictures) == 0


def test_batches_do_not_change_the_edits(pipe, cases, edits):
    again = make_edits(pipe, cases, SCALES, dataclasses.replace(SETTINGS, batch_size=5))
    for scale in SCALES:
        # float sums of another batch size may round a pixel differently
        assert np.abs(again.own[scale].astype(int) - edits.own[scale]).max() <= 1


def test_right_and_shuffled_differ_by_the_exemplar_alone(pipe, cases, edits):
    partner = edits.partner
    shown = [cases[i].exemplar for i in partner]
    by_hand = edit_batch(pipe, cases, dataclasses.replace(SETTINGS, guidance_scale=4.0), shown)
    assert np.abs(by_hand.astype(int) - edits.shuffled[4.0]).max() <= 1
    assert all(np.any(edits.own[4.0][i] != edits.shuffled[4.0][i]) for i in range(len(cases)))


def test_decoded_images_are_the_posterior_means_decoded(pipe, cases, edits):
    for index in (0, 5):
        pixels = torch.from_numpy(cases[index].image).permute(2, 0, 1)[None] / 127.5 - 1.0
        with torch.no_grad():
            posterior = pipe.model.autoencoder.encode(pixels)
            decoded = pipe.model.autoencoder.decode(posterior.mean)[0].permute(1, 2, 0).numpy()
        expected = np.clip((decoded + 1.0) * 127.5, 0.0, 255.0)
        # half a grey level of rounding, and float sums of another batch size
        assert np.abs(edits.decoded[index] - expected).max() < 0.51


def test_noise_belongs_to_seed_and_case():
    draws = {key: torch.randn(4, generator=noise_of(*key)) for key in ((0, 1), (0, 2), (1, 1))}
    assert torch.equal(draws[0, 1], torch.randn(4, generator=noise_of(0, 1)))
    assert not torch.equal(draws[0, 1], draws[0, 2])
    assert not torch.equal(draws[0, 1], draws[1, 1])


def test_progress_counts_every_edit(pipe, cases):
    seen: list[tuple[int, int]] = []
    make_edits(pipe, cases[:3], SCALES, SETTINGS, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((), "each once"),
        ((1.0, 1.0), "each once"),
        ((1.0, -2.0), "guidance scale is -2.0; it must be a number from 0 up"),
        ((float("nan"),), "guidance scale is nan"),
    ],
)
def test_bad_guidance_scales_are_refused_at_once(scales, message):
    with pytest.raises(UserError, match=message):
        at_scales(SETTINGS, scales)


def test_scores_of_the_true_objects_are_the_ceiling(cases, edits, features):
    """Edits that are the true objects score as the ceiling does, against the very same negatives."""
    images = np.stack([case.image for case in cases])
    perfect = dataclasses.replace(edits, own={1.0: images, 4.0: images})
    scores = score_edits(cases, perfect, features)
    assert scores.guidance[4.0].similarity == scores.ceiling.similarity
    assert scores.ceiling.first_of_20 is None  # six objects are not twenty
    assert scores.guidance[4.0].gain is not None
    assert scores.guidance[4.0].gain.value == 0.0
    assert scores.guidance[1.0].gain is None
    assert scores.ceiling.win_rate.value > 0.8
    assert scores.cases_sha256 == cases_hash(cases)


def test_report_forms(cases, edits, features):
    scores = score_edits(cases, edits, features)
    data = scores.to_dict()
    assert [row["guidance_scale"] for row in data["guidance"]] == [1.0, 4.0]
    assert data["objects"] == 6
    assert data["largest_change_outside_mask"] == 0
    assert set(data["ceiling"]) == set(data["autoencoder_ceiling"]) - {"psnr"}
    assert data["ceiling"]["first_of_20"] is data["ceiling"]["grey_first_of_20"] is None
    table = markdown(scores.table())
    assert "| guidance 4 |" in table
    assert "| autoencoder alone (its ceiling) |" in table
    assert "true object (ceiling)" in table


def test_a_change_outside_the_mask_is_seen():
    images, masks = np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 4), np.uint8)
    masks[0, :2] = 255
    edited = images.copy()
    edited[0, 0] = 200
    assert changed_outside(images, masks, edited) == 0
    edited[0, 3, 3, 1] = 9
    assert changed_outside(images, masks, edited) == 9


class Means:
    """Stands in for the tower: mean and deviation of each channel."""

    def squashed(self, images):
        values = [image.astype(float) for image in images]
        return np.stack(
            [np.concatenate([each.mean((0, 1)) - 128.0, each.std((0, 1)) - 40.0]) for each in values]
        )


def features_of(images, *, grey=False):
    return Means().squashed([to_grey(image) if grey else image for image in images])


@pytest.fixture(scope="module")
def shown() -> tuple[list[Case], np.ndarray, np.ndarray]:
    """Cases in a shuffled order, edits that resemble their exemplars somewhat, and some that do not."""
    rng = np.random.default_rng(5)
    tints = rng.normal(0.0, 30.0, (COUNT, 3))

    def images(noise: float) -> np.ndarray:
        tint = tints + rng.normal(0.0, noise, tints.shape)
        pixels = 128.0 + tint[:, None, None] + rng.normal(0.0, 30.0, (COUNT, 6, 6, 3))
        return np.clip(pixels, 0, 255).astype(np.uint8)

    exemplars, mask = images(0.0), np.full((6, 6), 255, np.uint8)
    order = rng.permutation(COUNT)
    cases = [Case(f"{i:03d}", exemplar, mask, exemplar) for i, exemplar in zip(order, exemplars, strict=True)]
    return cases, images(25.0), images(25.0)[::-1].copy()


@pytest.mark.parametrize("grey", [False, True])
def test_a_row_is_scikit_learns(shown, grey):
    cases, own, shuffled = shown
    scorer = Scorer(cases, Means())
    row = scorer.row(scorer.regions(own), scorer.similarity(scorer.regions(shuffled)))
    exemplars = features_of([case.exemplar for case in cases], grey=grey)
    table = cosine_similarity(features_of(list(own), grey=grey), exemplars)
    negative = np.diagonal(cosine_similarity(features_of(list(shuffled), grey=grey), exemplars))
    truth = [1] * COUNT + [0] * COUNT
    expected = roc_auc_score(truth, np.concatenate([np.diagonal(table), negative]))
    found = row.grey_auc if grey else row.auc
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert found.low < found.value < found.high
    order = np.argsort([case.id for case in cases])
    drawn = table[np.ix_(order, order)]
    best = [drawn[i, i] > drawn[i, places].max() for i, places in enumerate(others(COUNT))]
    first = row.grey_first_of_20 if grey else row.first_of_20
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
    for name in ("auc", "grey_auc", "first_of_20", "grey_first_of_20", "similarity", "win_rate"):
        assert getattr(one, name).value == pytest.approx(getattr(other, name).value, abs=1e-12)


def test_negatives_of_true_objects_are_other_exemplars(shown):
    cases, own, _ = shown
    scorer, partner = Scorer(cases, Means()), derangement(COUNT, 0)
    regions = scorer.regions(own)
    exemplars = features_of([case.exemplar for case in cases])
    expected = cosine_similarity(features_of(list(own)), exemplars)[np.arange(COUNT), partner]
    assert scorer.similarity(regions, partner)[0] == pytest.approx(expected)


def test_psnr_is_scikit_images(shown):
    _, one, other = shown
    pairs = zip(one, other, strict=True)
    expected = np.mean([peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs])
    assert mean_psnr(one, other) == pytest.approx(expected)
