"""What every score is made of: batches of cases with their edits, and measures that collect from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from pbe.evaluation.metrics.results import Better, Bootstrap, Family, Score, ScoreCard, case_score


class NotRunError(Exception):
    """A score cannot be made for want of something; the text says what, as in ``needs the weights``."""


class Case(Protocol):
    """What is read of a case: pictures are uint8 RGB, ``mask`` is 255 where the edit repaints."""

    @property
    def id(self) -> str:
        """Name of the case."""

    @property
    def image(self) -> np.ndarray:
        """``h w 3``; holds the true object."""

    @property
    def mask(self) -> np.ndarray:
        """``h w``."""

    @property
    def exemplar(self) -> np.ndarray:
        """``e f 3``."""


@dataclass(frozen=True)
class Batch:
    """Some cases with their edits, each uint8 ``h w 3`` of the size of its case's image.

    Attributes:
        positions: places of the cases in the benchmark.
        cases: the cases.
        edits: the edits.
        memo: features that several measures share, made once a batch.
    """

    positions: list[int]
    cases: list[Case]
    edits: list[np.ndarray]
    memo: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def shared(self, model: str, view: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return what ``make`` returns, made once for every pair of model and view."""
        if (model, view) not in self.memo:
            self.memo[model, view] = make()
        return self.memo[model, view]


@dataclass(frozen=True)
class Outcome:
    """What a measure is told when all batches are through.

    Attributes:
        count: cases in the benchmark.
        excluded: cases that came in no batch, by reason.
        cases_sha256: of names, true pictures, masks and exemplars of the cases that came.
        bootstrap: how intervals are made.
        reference_sha256: of the folder of real pictures, if one was given.
    """

    count: int
    excluded: dict[str, int]
    cases_sha256: str
    bootstrap: Bootstrap
    reference_sha256: str = ""

    def with_excluded(self, reason: str, count: int) -> Outcome:
        """Return the same with more cases left out."""
        return replace(self, excluded=self.excluded | {reason: count})


class Measure(ABC):
    """Sees every batch once and then makes its scores."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take one batch in."""

    @abstractmethod
    def finish(self, outcome: Outcome) -> list[Score]:
        """Make the scores."""


class CaseMeasure(Measure):
    """A score that is the mean of a number for each case.

    Args:
        name: of the score.
        family: of the score.
        better: which direction.
        measure: the numbers ``(b,)`` of a batch; NaN leaves a case out.
        card: what is known beforehand.
        finish: see :func:`pbe.evaluation.metrics.results.case_score`.
        show: likewise.
        against_images: the edits are compared with their cases, whose hash the card then bears; if not, the
            card says itself what they are compared with.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        better: Better,
        measure: Callable[[Batch], Sequence[float] | np.ndarray],
        card: ScoreCard,
        *,
        finish: Callable[[float], float] = lambda mean: mean,
        show: Callable[[np.ndarray], np.ndarray] = lambda values: values,
        against_images: bool = True,
    ) -> None:
        self.name, self.family, self.better = name, family, better
        self.measure, self.card = measure, card
        self.map, self.show, self.against_images = finish, show, against_images
        self.values: dict[int, float] = {}

    def update(self, batch: Batch) -> None:
        """Measure a batch."""
        values = np.asarray(self.measure(batch), np.float64)
        self.values.update(zip(batch.positions, values.tolist(), strict=True))

    def finish(self, outcome: Outcome) -> list[Score]:
        """Average over the cases."""
        values = np.full(outcome.count, np.nan)
        values[list(self.values)] = list(self.values.values())
        known = self.card.to_dict()
        if self.against_images:
            known["reference_sha256"] = outcome.cases_sha256
        score = case_score(
            self.name,
            self.family,
            self.better,
            values,
            ScoreCard(**known),
            outcome.bootstrap,
            excluded=outcome.excluded,
            finish=self.map,
            show=self.show,
        )
        return [score]
