"""What tables say of scores that could not be made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pbe.evaluation.benchmark.page import ScoredEdits, markdown_page, score_tables
from pbe.evaluation.metrics.scoring import ScoreSettings, score
from tests.evaluation.metrics.test_scoring import make

SETTINGS = ScoreSettings(("psnr-outside", "colour-inside"))


def test_a_table_names_what_left_a_score_without_cases():
    cases, edits = make(4)
    cases = [replace(case, mask=np.full_like(case.mask, 255)) for case in cases]
    scores = score(cases, [None, *edits[1:]], SETTINGS)
    run = ScoredEdits("mine", scores)
    text = markdown_page("T", score_tables([run], coco_ee=False), [run])
    assert "psnr-outside not run: no case is left to score (1 missing, 3 not a finite number)" in text


def test_a_score_that_one_set_alone_lacks_is_explained():
    cases, edits = make(3)
    full = [replace(case, mask=np.full_like(case.mask, 255)) for case in cases]
    whole, lacking = score(cases, edits, SETTINGS), score(full, edits, SETTINGS)
    runs = [ScoredEdits("mine", whole), ScoredEdits("theirs", lacking)]
    (table,) = score_tables(runs, coco_ee=False)
    assert table.rows[0][-1] == "not run"
    assert table.note == ("psnr-outside of theirs not run: no case is left to score (3 not a finite number)")
    (table,) = score_tables(runs[:1], coco_ee=False)
    assert table.note == ""
