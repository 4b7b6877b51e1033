"""Own against other exemplars and another pose: worked by hand, and models whose answer is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pbe.evaluation.ablation.measuring import POSE, exemplar_auc, own_share, pose_scores
from pbe.evaluation.benchmark.toy import ToyCase
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.bootstrap import Bootstrap

FEW = Bootstrap(resamples=200)


def test_the_share_of_exemplars_that_are_further() -> None:
    exemplars = np.eye(3) * 2.0
    regions = np.array([[1.0, 0.0, 0.0], [3.0, 2.0, 1.0], [0.0, 1.0, 1.0]])
    # the first is nearest to its own, the second to one other, the third as near to another as to its own
    np.testing.assert_allclose(own_share(regions, exemplars), [1.0, 0.5, 0.75])


def test_pasted_exemplars_are_found_and_those_of_others_are_not(cases: list[ToyCase]) -> None:
    mask = np.full(cases[0].exemplar.shape[:2], 255, np.uint8)
    shown = [Case(str(i), case.exemplar, mask, case.exemplar) for i, case in enumerate(cases)]
    own = [case.exemplar for case in cases]
    bootstrap = Bootstrap(resamples=100)
    pasted = exemplar_auc(shown, own, bootstrap)
    assert (pasted.value, pasted.family, pasted.better) == (1.0, "toy", "higher")
    assert pasted.card.pictures == len(cases)
    assert exemplar_auc(shown, own[1:] + own[:1], bootstrap).value < 0.75
    plain = exemplar_auc(shown, [np.full_like(own[0], 127)] * len(own), bootstrap)
    assert plain.value == pytest.approx(
        0.5
    )  # every region is the same, so the ranks of exemplars are shared out


def pasted(case: ToyCase, exemplar: np.ndarray) -> np.ndarray:
    x, y, width, height = cv2.boundingRect(case.mask)
    edit = case.image.copy()
    edit[y : y + height, x : x + width] = cv2.resize(exemplar, (width, height), interpolation=cv2.INTER_AREA)
    return edit


def test_a_copier_pays_for_the_pose_and_one_who_knows_the_object_does_not(cases: list[ToyCase]) -> None:
    own = [case.image for case in cases]  # a copy of the hidden object in its place is the image itself
    copier = pose_scores(cases, [pasted(case, case.exemplar) for case in cases], own, FEW)
    assert [one.name for one in copier] == list(POSE)
    assert copier[0].value == pytest.approx(1.0)
    assert copier[1].value > 0.2
    assert copier[1].low > 0.0
    knower = pose_scores(cases, own, own, FEW)
    assert knower[1].value == pytest.approx(0.0)
    assert (knower[1].family, knower[1].better) == ("clean", "lower")
    assert knower[1].card.pictures == len(cases)


def test_the_gap_is_paired(cases: list[ToyCase]) -> None:
    """Swapping the roles of the edits turns the sign of every case's gap."""
    first = [case.image for case in cases]
    second = [pasted(case, case.exemplar) for case in cases]
    there, back = (pose_scores(cases, *pair, FEW)[1] for pair in ((first, second), (second, first)))
    assert there.per_case is not None
    assert back.per_case is not None
    np.testing.assert_allclose(there.per_case, -back.per_case, atol=1e-12)
