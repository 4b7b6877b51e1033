"""The layout scores on images whose right answer is known."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from pbe.data.toy.scenes import ToyWorld
from pbe.evaluation.benchmark.toy import ToyCase, make_case
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.copy_paste import GRID, LAYOUT_NAMES, agreement, layout, layout_copy, layout_true
from pbe.evaluation.metrics.scoring import ScoreSettings, score

COUNT = 16


@pytest.fixture(scope="module")
def toy(world: ToyWorld) -> list[ToyCase]:
    return [make_case(world, index, 0, 64, 64) for index in range(0, 11 * COUNT, 11)]


def pasted(case: ToyCase, exemplar: np.ndarray) -> np.ndarray:
    x, y, width, height = cv2.boundingRect(case.mask)
    edit = case.image.copy()
    edit[y : y + height, x : x + width] = cv2.resize(exemplar, (width, height), interpolation=cv2.INTER_AREA)
    return edit


def test_agreement_is_the_correlation_of_what_numpy_says(toy):
    for first, second in itertools.pairwise(toy):
        a, b = layout(first.image), layout(second.image)
        for channel in a.mean(axis=(0, 1)):
            assert channel == pytest.approx(0.0, abs=1e-9)
        assert a.shape == (GRID, GRID, 3)
        assert agreement(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-12)


def test_a_single_colour_agrees_with_nothing(toy):
    plain = np.full((20, 30, 3), 127, np.uint8)
    assert layout_copy(plain, toy[0].exemplar) == 0.0
    assert layout_true(plain, plain, np.full((20, 30), 255, np.uint8)) == 0.0


def test_two_halves_worked_by_hand():
    """Left black and right white: the mirror is its opposite, so the copy counts 1 - (-1)."""
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 255
    assert layout_copy(halves, halves) == pytest.approx(2.0)
    assert layout_copy(halves[:, ::-1], halves) == pytest.approx(-2.0)
    upright = halves.transpose(1, 0, 2)  # above black, below white: its own mirror
    assert layout_copy(upright, upright) == pytest.approx(0.0)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 16:48] = 255
    assert layout_true(halves, halves, mask) == pytest.approx(1.0)
    assert layout_true(halves, 255 - halves, mask) == pytest.approx(-1.0)


def test_copies_are_high_mirrored_copies_low_and_true_objects_below_zero(toy):
    """The toy benchmark's exemplars face the other way than the hidden objects."""
    settings = ScoreSettings(metrics=("layout-copy", "layout-true"), bootstrap=Bootstrap(resamples=200))
    cases = [Case(str(i), case.image, case.mask, case.exemplar) for i, case in enumerate(toy)]

    def scored(edits: list[np.ndarray]) -> dict[str, float]:
        return {one.name: one.value for one in score(cases, edits, settings)}

    copied = scored([pasted(case, case.exemplar) for case in toy])
    mirrored = scored([pasted(case, np.ascontiguousarray(case.exemplar[:, ::-1])) for case in toy])
    true = scored([case.image for case in toy])
    assert copied["layout-copy"] > 0.3
    assert mirrored["layout-copy"] == pytest.approx(-copied["layout-copy"], abs=0.02)
    assert true["layout-copy"] < -0.1
    assert set(true) == {*LAYOUT_NAMES, "layout-true"}
    for one in (copied, mirrored, true):
        assert one["layout-copy-true"] == pytest.approx(true["layout-copy"])
    assert true["layout-true"] == pytest.approx(1.0)
    assert copied["layout-true"] < mirrored["layout-true"] < 1.0
