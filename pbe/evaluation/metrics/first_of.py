"""Is the right exemplar the most similar of twenty? Of edits and of true objects, in colour and in grey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pbe.evaluation.metrics.bootstrap import CHOICE, first_of
from pbe.evaluation.metrics.features import region, to_grey
from pbe.evaluation.metrics.measures import Batch, Measure, Outcome
from pbe.evaluation.metrics.region_similarity import CORRECT_RULE
from pbe.evaluation.metrics.results import Score, ScoreCard, case_score, not_run
from pbe.evaluation.metrics.towers import Tower

NAME = f"toy-first-of-{CHOICE}"
NAMES = (NAME, f"{NAME}-grey", f"{NAME}-true", f"{NAME}-grey-true")
NOTES = f"own exemplar before {CHOICE - 1} of other cases, drawn by place among the cases that were scored"


class FirstOfMeasure(Measure):
    """Collects the features of regions and exemplars, and compares them when all are there.

    Args:
        tower: makes the features.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.positions: list[int] = []
        self.exemplars: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self.regions: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}

    def update(self, batch: Batch) -> None:
        """Make the features of a batch."""
        self.positions += batch.positions
        exemplars = [case.exemplar for case in batch.cases]
        pairs = list(zip(batch.cases, batch.edits, strict=True))
        edits = [region(edit, case.mask) for case, edit in pairs]
        true = [region(case.image, case.mask) for case, _ in pairs]
        for grey in (False, True):
            self.exemplars[grey].append(self._features(batch, "exemplars", exemplars, grey))
            names = NAMES[1::2] if grey else NAMES[::2]
            for name, view, parts in zip(names, ("regions", "true regions"), (edits, true), strict=True):
                self.regions[name].append(self._features(batch, view, parts, grey))

    def _features(self, batch: Batch, view: str, pictures: Sequence[np.ndarray], grey: bool) -> np.ndarray:
        def make() -> np.ndarray:
            return self.tower.squashed([to_grey(one) for one in pictures] if grey else pictures)

        return batch.shared(self.tower.key, f"{view}, grey" if grey else view, make)

    def finish(self, outcome: Outcome) -> list[Score]:
        """Make the four scores; fewer cases than there are to choose from have none."""
        spec = self.tower.spec
        card = ScoreCard(
            spec.architecture, self.tower.sha256, self.tower.squashed_filter, CORRECT_RULE, notes=NOTES
        )
        card = replace(card, reference_sha256=outcome.cases_sha256)
        count = len(self.positions)
        if count < CHOICE:
            why = f"needs at least {CHOICE} cases, not {count}"
            return [replace(not_run(name, "toy", "higher", why), card=card) for name in NAMES]
        scores = []
        for name in NAMES:
            exemplars = np.concatenate(self.exemplars["grey" in name])
            values = np.full(outcome.count, np.nan)
            values[self.positions] = first_of(np.concatenate(self.regions[name]), exemplars)
            scores.append(
                case_score(name, "toy", "higher", values, card, outcome.bootstrap, excluded=outcome.excluded)
            )
        return scores
