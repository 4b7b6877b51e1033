"""What an exemplar in another pose costs, against the hidden object itself as exemplar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pbe.evaluation.metrics.base import Case, Score, case_score
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.layout import TRUE_CARD, layout_true

NAMES = ("layout-true-own", "pose-gap")


def pose_scores(
    cases: Sequence[Case], edits: Sequence[np.ndarray], own: Sequence[np.ndarray], bootstrap: Bootstrap
) -> list[Score]:
    """Score the edits made from own exemplars, and what the benchmark's exemplars lose against them.

    Both edits of a case have the same picture, mask and noise; only the exemplar differs. How near they
    come to the real picture is measured by the layout of colours (``layout-true``). A model that copies
    does well with the object itself and loses where it stands in another pose; one that knows what the
    object is, and no more, does equally well with both.

    Args:
        cases: each read once.
        edits: with the benchmark's exemplars, uint8 ``h w 3``, one a case.
        own: with the hidden objects as exemplars, likewise.
        bootstrap: how intervals are made.

    Returns:
        ``layout-true-own`` and ``pose-gap``, the paired difference.
    """
    values = np.empty((len(cases), 2))
    for place in range(len(cases)):
        case = cases[place]
        pair = (edits[place], own[place])
        values[place] = [layout_true(case.image, edit, case.mask) for edit in pair]
    own_card = replace(TRUE_CARD, notes=f"{TRUE_CARD.notes}; exemplars cut from it")
    gap_card = replace(TRUE_CARD, notes="layout-true from own exemplars, less that from the benchmark's")
    return [
        case_score(NAMES[0], "clean", "higher", values[:, 1], own_card, bootstrap),
        case_score(NAMES[1], "clean", "lower", values[:, 1] - values[:, 0], gap_card, bootstrap),
    ]
