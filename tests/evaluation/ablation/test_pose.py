"""What another pose costs: models whose answer is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pbe.evaluation.ablation.pose import NAMES, pose_scores
from pbe.evaluation.benchmark.toy import ToyCase
from pbe.evaluation.metrics.bootstrap import Bootstrap

FEW = Bootstrap(resamples=200)


def pasted(case: ToyCase, exemplar: np.ndarray) -> np.ndarray:
    x, y, width, height = cv2.boundingRect(case.mask)
    edit = case.image.copy()
    edit[y : y + height, x : x + width] = cv2.resize(exemplar, (width, height), interpolation=cv2.INTER_AREA)
    return edit


def test_a_copier_pays_for_the_pose_and_one_who_knows_the_object_does_not(cases: list[ToyCase]) -> None:
    own = [case.image for case in cases]  # a copy of the hidden object in its place is the picture itself
    copier = pose_scores(cases, [pasted(case, case.exemplar) for case in cases], own, FEW)
    assert [one.name for one in copier] == list(NAMES)
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
