"""Own against other exemplars: worked by hand, and on pictures whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from pbe.evaluation.ablation.auc import exemplar_auc, own_share
from pbe.evaluation.benchmark.toy import ToyCase
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.bootstrap import Bootstrap


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
