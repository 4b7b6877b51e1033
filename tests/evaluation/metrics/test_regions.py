"""First of twenty on finished edits: the numbers of the toy path, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pbe.evaluation.benchmark.toy_run import Scorer
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.feature_scores import FIRST_OF_SCORES as NAMES
from pbe.evaluation.metrics.scoring import ScoreSettings, score
from tests.evaluation.metrics.test_scoring import by_name, make

SETTINGS = ScoreSettings(("toy-first-of-20",), batch_size=8)


@pytest.fixture(scope="module")
def made() -> tuple[list[Case], list[np.ndarray]]:
    """Edits that hold their case's exemplar in 12 of 22 cases, and another one's in the rest."""
    cases, edits = make(22)
    for place, edit in enumerate(edits):
        exemplar = cases[place if place % 2 or place < 2 else place - 2].exemplar
        edit[6:18, 5:15] = exemplar[:12, :10]
    return cases, edits


def test_they_are_the_toy_paths_numbers(made, features):
    cases, edits = made
    found = by_name(score(cases, edits, SETTINGS))
    assert tuple(found) == NAMES
    scorer = Scorer(cases, features)
    for images, end in ((np.stack(edits), ""), (np.stack([case.image for case in cases]), "-true")):
        regions = scorer.regions(images)
        row = scorer.row(regions, scorer.similarity(regions, np.roll(np.arange(22), 1)))
        for name, expected in (
            ("toy-first-of-20", row.first_of_20),
            ("toy-first-of-20-grey", row.grey_first_of_20),
        ):
            one = found[name + end]
            assert (one.value, one.low, one.high) == (expected.value, expected.low, expected.high)
            assert (one.family, one.better, one.card.pictures) == ("toy", "higher", 22)
            assert one.card.weights_sha256 == features.sha256
    assert found["toy-first-of-20"].value > found["toy-first-of-20-true"].value  # random holes say nothing


def test_cases_left_out_are_among_no_ones_others(made):
    cases, edits = made
    part = [None if place in (3, 11) else edit for place, edit in enumerate(edits)]
    whole = by_name(score(cases, part, SETTINGS))["toy-first-of-20"]
    kept = [place for place, edit in enumerate(part) if edit is not None]
    alone = by_name(score([cases[i] for i in kept], [edits[i] for i in kept], SETTINGS))["toy-first-of-20"]
    assert np.isnan(whole.per_case[[3, 11]]).all()
    assert np.array_equal(whole.per_case[kept], alone.per_case)
    assert whole.card.excluded == {"missing": 2}


def test_fewer_than_twenty_cases_have_no_score(made):
    cases, edits = made
    found = score(cases[:19], edits[:19], SETTINGS)
    assert [one.name for one in found] == list(NAMES)
    assert {one.why_not for one in found} == {"not run: needs at least 20 cases, not 19"}
    assert json.loads(json.dumps(found[0].to_dict()))["value"] is None


def test_batches_change_nothing(made):
    cases, edits = made
    one, other = (score(cases, edits, replace(SETTINGS, batch_size=size)) for size in (5, 22))
    assert [score.per_case.tolist() for score in one] == [score.per_case.tolist() for score in other]
