from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pbe.errors import UserError
from pbe.evaluation.benchmark.toy_edits import EditSettings, edit_batch, make_edits, noise_generator
from pbe.evaluation.benchmark.toy_scores import cases_hash, changed_outside, markdown_table, score_edits

SETTINGS = EditSettings(guidance=(1.0, 4.0), solver="ddim", steps=2, seed=0, batch_size=4)


@pytest.fixture(scope="module")
def edits(pipe, cases):
    return make_edits(pipe, cases, SETTINGS)


def test_shapes_and_background(cases, edits):
    images, masks = np.stack([c.image for c in cases]), np.stack([c.mask for c in cases])
    for pictures in (*edits.own.values(), *edits.shuffled.values()):
        assert pictures.shape == images.shape
        assert pictures.dtype == np.uint8
        assert changed_outside(images, masks, pictures) == 0


def test_batches_do_not_change_the_edits(pipe, cases, edits):
    again = make_edits(pipe, cases, dataclasses.replace(SETTINGS, batch_size=5))
    for scale in SETTINGS.guidance:
        # float sums of another batch size may round a pixel differently
        assert np.abs(again.own[scale].astype(int) - edits.own[scale]).max() <= 1


def test_right_and_shuffled_differ_by_the_exemplar_alone(pipe, cases, edits):
    partner = edits.partner
    shown = [cases[i].exemplar for i in partner]
    by_hand = edit_batch(pipe, cases, shown, 4.0, dataclasses.replace(SETTINGS, batch_size=6))
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
    draws = {key: torch.randn(4, generator=noise_generator(*key)) for key in ((0, 1), (0, 2), (1, 1))}
    assert torch.equal(draws[0, 1], torch.randn(4, generator=noise_generator(0, 1)))
    assert not torch.equal(draws[0, 1], draws[0, 2])
    assert not torch.equal(draws[0, 1], draws[1, 1])


def test_progress_counts_every_edit(pipe, cases):
    seen: list[tuple[int, int]] = []
    make_edits(pipe, cases[:3], SETTINGS, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": ()}, "each once"),
        ({"guidance": (1.0, 1.0)}, "each once"),
        ({"guidance": (1.0, -2.0)}, "from 0 up, not 1.0, -2.0"),
        ({"guidance": (float("nan"),)}, "from 0 up, not nan"),
        ({"solver": "magic"}, "no solver 'magic'; there are: "),
        ({"steps": 0}, "number of steps is 0"),
        ({"batch_size": 0}, "batch size is 0"),
    ],
)
def test_bad_settings_are_refused_at_once(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_scores_of_the_true_objects_are_the_ceiling(cases, edits, features):
    """Edits that are the true objects score as the ceiling does, against the very same negatives."""
    images = np.stack([case.image for case in cases])
    perfect = dataclasses.replace(edits, own={1.0: images, 4.0: images})
    scores = score_edits(cases, perfect, features)
    assert scores.guidance[4.0].similarity == scores.ceiling.similarity
    assert scores.ceiling.first is None  # six objects are not twenty
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
    table = markdown_table(scores)
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
