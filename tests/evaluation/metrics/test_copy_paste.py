"""The copy-paste score on images whose right answer is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from pbe.data.toy.scenes import ToyWorld
from pbe.evaluation.benchmark.toy import ToyCase, make_case
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.bootstrap import auc
from pbe.evaluation.metrics.copy_paste import (
    MAX_STRETCH,
    NAMES,
    allowed,
    explained,
    explained_shares,
    refine,
    sample,
    warp_grid,
)
from pbe.evaluation.metrics.scoring import ScoreSettings, score
from scripts.check_copy_paste import main, paste, shares_by_kind

COUNT = 24


@pytest.fixture(scope="module")
def toy(world: ToyWorld) -> list[ToyCase]:
    return [make_case(world, index, 0, 64, 64) for index in range(0, 7 * COUNT, 7)]


@pytest.fixture(scope="module")
def shares(toy: list[ToyCase]) -> dict[str, np.ndarray]:
    return shares_by_kind(toy, 0)


def test_pasted_exemplar_is_high_true_object_low_plain_fill_lowest(shares):
    assert shares["pasted"].mean() > 0.75
    assert 0.1 < shares["true"].mean() < 0.5
    assert shares["inpainted"].mean() < 0.12
    assert np.all(shares["grey"] == 0.0)


def test_the_kinds_hardly_overlap(shares):
    assert auc(shares["pasted"], shares["true"]) > 0.95
    assert auc(shares["true"], shares["inpainted"]) > 0.88
    assert auc(shares["pasted"], shares["inpainted"]) == 1.0


@pytest.mark.parametrize("scale", [1.0, 1.3, 1.5, 1.7])
def test_small_copies_are_found_as_well(toy, scale):
    """Exemplars down to six tenths of the hole's size, in its middle and before grey."""
    edits = []
    for case in toy[:8]:
        x, y, width, height = cv2.boundingRect(case.mask)
        w, h = round(width / scale), round(height / scale)
        left, top = x + (width - w) // 2, y + (height - h) // 2
        edit = case.image.copy()
        edit[y : y + height, x : x + width] = 127
        edit[top : top + h, left : left + w] = cv2.resize(case.exemplar, (w, h), interpolation=cv2.INTER_AREA)
        edits.append(edit)
    found = explained_shares(edits, [case.mask for case in toy[:8]], [case.exemplar for case in toy[:8]])
    assert found.mean() > 0.5


def test_every_share_is_one(shares):
    together = np.concatenate(list(shares.values()))
    assert np.all((together >= 0.0) & (together <= 1.0))


def test_it_is_deterministic_and_other_cases_change_nothing(toy):
    pictures, masks, exemplars = (
        [getattr(case, name) for case in toy[:4]] for name in ("image", "mask", "exemplar")
    )
    whole = explained_shares(pictures, masks, exemplars)
    assert np.array_equal(whole, explained_shares(pictures, masks, exemplars))
    parts = [
        explained_shares(pictures[i : i + 1], masks[i : i + 1], exemplars[i : i + 1])[0] for i in range(4)
    ]
    assert whole == pytest.approx(parts, abs=1e-4)


def test_the_metric_gives_edit_true_object_and_their_difference(toy):
    cases = [Case(str(case.index), case.image, case.mask, case.exemplar) for case in toy[:4]]
    edits = [paste(case, 8.0, 0.95, 1.0, 0.02) for case in toy[:4]]
    found = score(cases, edits, ScoreSettings(("copy-paste",), batch_size=3))
    assert tuple(one.name for one in found) == NAMES
    edit, true, excess = (one.per_case for one in found)
    assert np.all(edit > 0.7)
    assert excess == pytest.approx(edit - true)
    assert found[2].low > 0.0


def test_a_warp_of_another_exemplar_explains_little(toy):
    masks = [case.mask for case in toy[:6]]
    edits = [paste(case, 8.0, 0.95, 1.0, 0.02) for case in toy[:6]]
    own = explained_shares(edits, masks, [case.exemplar for case in toy[:6]])
    other = explained_shares(edits, masks, [case.exemplar for case in toy[1:7]])
    assert np.all(own > other + 0.3)


def test_masks_of_any_shape_count_their_own_pixels_only(toy):
    case = toy[0]
    rows, columns = np.nonzero(case.mask > 127)
    mask = np.zeros_like(case.mask)
    centre = (int(columns.mean()), int(rows.mean()))
    cv2.ellipse(mask, centre, (int(np.ptp(columns)) // 2, int(np.ptp(rows)) // 2), 0, 0, 360, 255, -1)
    edit = paste(case, 0.0, 0.9, 1.0, 0.0)
    spoilt = np.where((mask > 0)[..., None], edit, 255 - edit).astype(np.uint8)
    (clean,) = explained_shares([edit], [mask], [case.exemplar])
    (beside,) = explained_shares([spoilt], [mask], [case.exemplar])
    assert min(clean, beside) > 0.6  # what lies outside reaches in through the shading alone


def test_explained_share_by_hand():
    target = torch.tensor([[[3.0, 4.0, 0.0]]])
    shown = torch.tensor([[[[6.0, 8.0, 0.0]], [[-3.0, -4.0, 0.0]], [[0.0, 4.0, 3.0]]]])
    share, gains = explained(target, shown, torch.ones(1, 3), 0.0)
    assert share[0].tolist() == pytest.approx([1.0, 0.0, (16 / 25) ** 2])
    assert gains[0, :, 0].tolist() == pytest.approx([0.5, 0.0, 16 / 25])


def test_refining_finds_a_known_warp():
    torch.manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.randn(1, 3, 8, 8), size=(32, 32), mode="bicubic")
    known = torch.tensor([[[0.95, -0.12, 0.06], [0.1, 0.9, -0.05]]])
    target = sample(picture, known[None], 32).view(1, 3, 32, 32)
    start = torch.eye(2, 3)[None, None]
    share, found = refine(picture, target, torch.ones(1, 32, 32), start, 0.0, 20)
    assert share.item() > 0.999
    assert found[0, 0].flatten().tolist() == pytest.approx(known.flatten().tolist(), abs=0.01)


def test_warps_that_go_too_far_are_not_allowed():
    eye = torch.eye(2, 3)
    tall = eye.clone()
    tall[1, 1] = MAX_STRETCH + 0.1
    moved = eye.clone()
    moved[0, 2] = 0.9
    assert allowed(torch.stack([eye, tall, moved, 0.1 * eye])).tolist() == [True, False, False, False]
    assert bool(allowed(warp_grid()).all())


def test_the_command_shows_the_table(capsys):
    assert main(["--objects", "2"]) == 0
    told = capsys.readouterr().out
    assert "| pasted |" in told
    assert "| stretched |" in told
    assert main(["--objects", "999"]) == 2
