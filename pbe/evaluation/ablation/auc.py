"""Does the painted region resemble its own exemplar more than those of other cases?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pbe.evaluation.metrics.base import Case, Score, ScoreCard, case_score
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.features import TOWER, region
from pbe.evaluation.metrics.towers import load_tower

NAME = "toy-exemplar-auc"
BATCH = 64


def exemplar_auc(cases: Sequence[Case], edits: Sequence[np.ndarray], bootstrap: Bootstrap) -> Score:
    """Score each case by the chance that its own exemplar is nearer to its region than another one's.

    The mean over cases is the area under the curve of own against shuffled exemplars, 0.5 being chance. It
    asks whether the exemplar decided what was painted, whatever the pose, and needs no further edits.

    Args:
        cases: at least two, each read once.
        edits: uint8 ``h w 3``, one a case.
        bootstrap: how the interval is made.
    """
    tower = load_tower("lite2", None, None)
    regions, exemplars = [], []
    for start in range(0, len(cases), BATCH):
        places = range(start, min(start + BATCH, len(cases)))
        batch = [cases[place] for place in places]
        shown = [region(edits[place], case.mask) for place, case in zip(places, batch, strict=True)]
        regions.append(tower.squashed(shown))
        exemplars.append(tower.squashed([case.exemplar for case in batch]))
    values = own_share(np.concatenate(regions), np.concatenate(exemplars))
    card = ScoreCard(
        feature_model=TOWER,
        weights_sha256=tower.sha256,
        resize_filter="bilinear to 128 x 128",
        crop_rule="bounding box of the mask's pixels above 127, whole; exemplars whole",
        notes="share of other cases' exemplars that the region resembles less than its own; ties half",
    )
    return case_score(NAME, "toy", "higher", values, card, bootstrap)


def own_share(regions: np.ndarray, exemplars: np.ndarray) -> np.ndarray:
    """Return the share of other exemplars that each region resembles less than its own, ``(n,)`` in [0, 1].

    Args:
        regions: ``(n, d)`` features of the painted regions.
        exemplars: ``(n, d)`` features of their exemplars, in the same order.
    """
    a, b = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (regions, exemplars))
    similarity = a.astype(np.float64) @ b.T.astype(np.float64)
    own = np.diagonal(similarity)[:, None]
    wins = (own > similarity) + 0.5 * (own == similarity)
    np.fill_diagonal(wins, 0.0)
    return wins.sum(axis=1) / (len(wins) - 1)
