"""What scores are made of: cases with their edits, measures that collect from them, and the score itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from pbe.editing.images import grey_out
from pbe.errors import UserError
from pbe.evaluation.metrics.bootstrap import Bootstrap

Family = Literal["paper", "clean", "toy"]
Better = Literal["higher", "lower"]
FAMILIES: dict[Family, str] = {
    "paper": "the paper's scores, as its released scripts compute them, and with the region's crop corrected",
    "clean": "the field's usual scores, and those of what the method is about",
    "toy": "scores of the toy world, on a small tower",
}
NAN = math.nan

# What a score is where nothing outside the mask differs by one bit.
PERFECT = {"psnr-outside": math.inf, "ssim-outside": 1.0, "lpips-outside": 0.0, "colour-outside": 0.0}


class NotRunError(UserError):
    """A score cannot be made for want of something; the text says what, as in ``needs the weights``."""


@dataclass(frozen=True)
class Case:
    """One case of a benchmark.

    Attributes:
        id: its name; of a benchmark's folder twelve digits, the stem of its edit's file.
        image: uint8 RGB ``h w 3``, the source with the true object.
        mask: uint8 ``h w``, 255 = repaint and 0 = keep.
        exemplar: uint8 RGB ``e f 3``.
    """

    id: str
    image: np.ndarray
    mask: np.ndarray
    exemplar: np.ndarray

    @property
    def masked(self) -> np.ndarray:
        """The image with the masked region at mid-grey, uint8 ``h w 3``."""
        return grey_out(self.image, self.mask > 127)

    @property
    def noise_key(self) -> str | int:
        """What the noise of its edits belongs to, beside the seed."""
        return self.id


@dataclass(frozen=True)
class ScoreCard:
    """What a score rests on; an empty text means that there is no such thing.

    Attributes:
        feature_model: architecture whose features are compared.
        weights_sha256: of the bytes of its weights.
        resize_filter: how an image or region comes to the size that is looked at.
        crop_rule: which part is looked at.
        pictures: number of edits that the score is made of.
        excluded: cases left out, by reason.
        reference_sha256: of what the edits are compared with: the cases (names, true images, masks and
            exemplars), a folder of real images, or a mixture fitted to some.
        interval: method, level and number of resamples.
        notes: what else a reader must know.
    """

    feature_model: str = ""
    weights_sha256: str = ""
    resize_filter: str = ""
    crop_rule: str = ""
    pictures: int = 0
    excluded: dict[str, int] = field(default_factory=dict)
    reference_sha256: str = ""
    interval: str = ""
    notes: str = ""


@dataclass(frozen=True)
class Score:
    """One score of a set of edits.

    Attributes:
        name: such as ``seam``; see :data:`pbe.evaluation.metrics.scoring.METRICS`.
        family: scores of two families never stand in one table.
        value: of all edits; NaN where the score was not run. Infinite for a PSNR of equal images.
        low: lower end of the interval; NaN where one image gives none.
        high: upper end.
        card: what it rests on.
        per_case: ``(n,)`` float64 in the order of the cases, NaN for those left out; None for scores of sets.
        better: which direction.
        run: False where something that it needs is not there.
        why_not: what that is, one line.
    """

    name: str
    family: Family
    value: float
    low: float
    high: float
    card: ScoreCard
    per_case: np.ndarray | None
    better: Better
    run: bool = True
    why_not: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary: NaN becomes None, an infinite number a text, ``inf``."""
        numbers = {name: json_number(getattr(self, name)) for name in ("value", "low", "high")}
        per_case = None if self.per_case is None else [json_number(value) for value in self.per_case]
        texts = {"better": self.better, "run": self.run, "why_not": self.why_not, "card": asdict(self.card)}
        return {"name": self.name, "family": self.family, **numbers, **texts, "per_case": per_case}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Score:
        """Read what :meth:`to_dict` returned; a KeyError, TypeError or ValueError where it is damaged."""
        texts = {name: content[name] for name in ("name", "family", "better", "run", "why_not")}
        numbers: dict[str, Any] = {name: _from_json(content[name]) for name in ("value", "low", "high")}
        per_case = content["per_case"]
        if per_case is not None:
            per_case = np.array([_from_json(one) for one in per_case], np.float64)
        return cls(**texts, **numbers, card=ScoreCard(**content["card"]), per_case=per_case)

    @property
    def exact(self) -> bool:
        """Whether every case is perfect to the last bit, as where the background is preserved."""
        if not self.run or self.per_case is None or self.name not in PERFECT:
            return False
        return bool(np.all(self.per_case[~np.isnan(self.per_case)] == PERFECT[self.name]))

    def text(self) -> str:
        """Return value and interval as a table shows them."""
        if not self.run:
            return "not run"
        if self.exact:
            return "exact" if math.isinf(self.value) else f"{self.value:g} (exact)"
        if math.isnan(self.low):
            return short_number(self.value)
        return f"{short_number(self.value)} ({short_number(self.low)} to {short_number(self.high)})"


def json_number(value: float) -> float | str | None:
    """Return a number as JSON holds it: NaN as None, an infinite one as a text."""
    value = float(value)
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def _from_json(value: float | str | None) -> float:
    return NAN if value is None else float(value)


def short_number(value: float) -> str:
    """Return a number as a table shows it: four significant digits, large ones whole."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}".replace("-0", "0")
    return f"{value:.0f}" if abs(value) >= 1000.0 else f"{value:#.4g}".rstrip(".")


def reasons(excluded: Mapping[str, int]) -> str:
    """Return what was left out as a text, such as ``3 missing, 1 damaged``."""
    return ", ".join(f"{count} {reason}" for reason, count in excluded.items())


def not_run(
    name: str,
    family: Family,
    better: Better,
    why: str,
    card: ScoreCard | None = None,
    per_case: np.ndarray | None = None,
) -> Score:
    """Return the score that could not be made for want of something; ``why`` says what it needs."""
    card = card or ScoreCard()
    return Score(name, family, NAN, NAN, NAN, card, per_case, better, False, f"not run: {why}")


def case_score(
    name: str,
    family: Family,
    better: Better,
    values: np.ndarray,
    card: ScoreCard,
    bootstrap: Bootstrap,
    *,
    excluded: Mapping[str, int] | None = None,
    finish: Callable[[float], float] = lambda mean: mean,
    show: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> Score:
    """Make the score that is a mean over cases.

    Args:
        name: of the score, as ``family`` and ``better``.
        family: see :class:`Score`.
        better: see :class:`Score`.
        values: ``(n,)`` in the order of the cases; what is not finite is left out.
        card: what is known; images, exclusions and interval are filled in.
        bootstrap: how the interval is made.
        excluded: cases known to be left out, by reason; others that are not finite are counted as such.
        finish: monotonic map from the mean to the score, such as mean squared error to decibels.
        show: the same for each case.
    """
    kept = np.isfinite(values)
    count, excluded = int(np.sum(kept)), dict(excluded or {})
    surprising = len(values) - count - sum(excluded.values())
    if surprising > 0:
        excluded["not a finite number"] = surprising
    how = f"{bootstrap.level:.0%} percentile bootstrap over images, {bootstrap.resamples} resamples"
    interval = how if count > 1 else "none: one image has none"
    card = replace(card, pictures=count, excluded=excluded, interval=interval)
    if not count:
        return not_run(name, family, better, f"no case is left to score ({reasons(excluded)})", card, values)
    estimate = bootstrap.of_mean(values[kept])
    low, high = sorted((finish(estimate.low), finish(estimate.high))) if count > 1 else (NAN, NAN)
    return Score(name, family, finish(estimate.value), low, high, card, show(values), better)


@dataclass(frozen=True)
class Batch:
    """Some cases with their edits, each uint8 ``h w 3`` of the size of its case's image.

    ``positions`` are the cases' places in the benchmark; ``memo`` holds features that several measures share.
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
        cases_sha256: of names, true images, masks and exemplars of the cases that came.
        bootstrap: how intervals are made.
        reference_sha256: of the folder of real images, if one was given.
    """

    count: int
    excluded: dict[str, int]
    cases_sha256: str
    bootstrap: Bootstrap
    reference_sha256: str = ""

    def with_excluded(self, reason: str, count: int) -> Outcome:
        """Return the same with more cases left out."""
        return replace(self, excluded=self.excluded | {reason: count})


@dataclass(frozen=True)
class Metric:
    """A row of the registry of metrics; ``names`` are those of its scores where they are not just its own.

    ``make`` gets :class:`pbe.evaluation.metrics.scoring.Tools` and makes the measure; it raises NotRunError
    where something is missing.
    """

    name: str
    family: Family
    better: Better
    make: Callable[[Any], Measure]
    names: tuple[str, ...] = ()

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of its scores."""
        return self.names or (self.name,)

    def not_run(self, why: str, card: ScoreCard | None = None) -> list[Score]:
        """Return its scores where they cannot be made; ``why`` says what they need."""
        return [not_run(name, self.family, self.better, why, card) for name in self.scores]

    def case_scores(
        self, values: Sequence[np.ndarray] | np.ndarray, card: ScoreCard, outcome: Outcome, **maps: Any
    ) -> list[Score]:
        """Return its scores as means over cases, of ``values`` each; for ``maps`` see :func:`case_score`."""
        how: dict[str, Any] = {"excluded": outcome.excluded, **maps}
        return [
            case_score(name, self.family, self.better, column, card, outcome.bootstrap, **how)
            for name, column in zip(self.scores, values, strict=True)
        ]


class Measure(ABC):
    """Sees every batch once and then makes the scores of a metric."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take one batch in."""

    @abstractmethod
    def finish(self, metric: Metric, outcome: Outcome) -> list[Score]:
        """Make the scores."""


class CaseMeasure(Measure):
    """Scores that are each the mean of a number for each case.

    Args:
        measure: the numbers ``(b,)`` of a batch, or ``(b, k)`` for ``k`` scores; NaN leaves a case out.
        card: what is known beforehand; where it names no other reference, it gets the hash of the cases.
        finish: see :func:`case_score`, as for ``show``.
    """

    def __init__(
        self,
        measure: Callable[[Batch], Sequence[float] | np.ndarray],
        card: ScoreCard,
        *,
        finish: Callable[[float], float] = lambda mean: mean,
        show: Callable[[np.ndarray], np.ndarray] = lambda values: values,
    ) -> None:
        self.measure, self.card = measure, card
        self.maps: dict[str, Any] = {"finish": finish, "show": show}
        self.values: dict[int, np.ndarray] = {}

    def update(self, batch: Batch) -> None:
        """Measure a batch."""
        rows = np.asarray(self.measure(batch), np.float64).reshape(len(batch.cases), -1)
        self.values.update(zip(batch.positions, rows, strict=True))

    def finish(self, metric: Metric, outcome: Outcome) -> list[Score]:
        """Average over the cases."""
        values = np.full((len(metric.scores), outcome.count), np.nan)
        for position, row in self.values.items():
            values[:, position] = row
        sha256 = self.card.reference_sha256 or outcome.cases_sha256
        return metric.case_scores(values, replace(self.card, reference_sha256=sha256), outcome, **self.maps)


def by_case(number: Callable[[np.ndarray, np.ndarray, np.ndarray], float]) -> Callable[[Batch], list[float]]:
    """Return what gives the numbers of a batch from that of one image, its edit and its mask."""

    def measure(batch: Batch) -> list[float]:
        pairs = zip(batch.cases, batch.edits, strict=True)
        return [number(case.image, edit, case.mask) for case, edit in pairs]

    return measure
