"""A score, its interval and its identity card: what it was measured with, on what, and what was left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from pbe.errors import UserError
from pbe.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Estimate, mean_interval

Family = Literal["paper", "clean", "toy"]
Better = Literal["higher", "lower"]
FAMILIES: dict[Family, str] = {
    "paper": "the paper's scores, as its released scripts compute them, and with the region's crop corrected",
    "clean": "the field's usual scores, and those of what the method is about",
    "toy": "scores of the toy world, on a small tower",
}

# What a score is where nothing outside the mask differs by one bit.
PERFECT = {"psnr-outside": math.inf, "ssim-outside": 1.0, "lpips-outside": 0.0, "colour-outside": 0.0}


@dataclass(frozen=True)
class ScoreCard:
    """What a score rests on; an empty text means that there is no such thing.

    Attributes:
        feature_model: architecture whose features are compared.
        weights_sha256: of the bytes of its weights.
        resize_filter: how a picture or region comes to the size that is looked at.
        crop_rule: which part is looked at.
        pictures: number of edits that the score is made of.
        excluded: cases left out, by reason.
        reference_sha256: of what the edits are compared with: the cases (names, true pictures, masks and
            exemplars), a folder of real pictures, or a mixture fitted to some.
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

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Score:
    """One score of a set of edits.

    Attributes:
        name: such as ``seam``; see :data:`pbe.evaluation.metrics.scoring.METRICS`.
        family: scores of two families never stand in one table.
        value: of all edits; NaN where the score was not run. Infinite for a PSNR of equal pictures.
        low: lower end of the interval; NaN where one picture gives none.
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
        per_case = None if self.per_case is None else [_json_number(value) for value in self.per_case]
        return {
            "name": self.name,
            "family": self.family,
            "value": _json_number(self.value),
            "low": _json_number(self.low),
            "high": _json_number(self.high),
            "better": self.better,
            "run": self.run,
            "why_not": self.why_not,
            "card": self.card.to_dict(),
            "per_case": per_case,
        }

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


def not_run(name: str, family: Family, better: Better, why: str) -> Score:
    """Return the score that could not be made for want of something; ``why`` says what it needs."""
    nan = float("nan")
    return Score(name, family, nan, nan, nan, ScoreCard(), None, better, False, f"not run: {why}")


def reasons(excluded: Mapping[str, int]) -> str:
    """Return what was left out as a text, such as ``3 missing, 1 damaged``."""
    return ", ".join(f"{count} {reason}" for reason, count in excluded.items())


def _json_number(value: float) -> float | str | None:
    value = float(value)
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def short_number(value: float) -> str:
    """Return a number as a table shows it: four significant digits, large ones whole."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}".replace("-0", "0")
    return f"{value:.0f}" if abs(value) >= 1000.0 else f"{value:#.4g}".rstrip(".")


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        seed: of the resampling.
        level: share that an interval holds, between 0 and 1.
        resamples: for means over cases, at least 1.
        set_resamples: for scores of whole sets, each of which is a distance anew; at least 2.

    Raises:
        UserError: a number outside these ranges.
    """

    seed: int = 0
    level: float = LEVEL
    resamples: int = RESAMPLES
    set_resamples: int = 50

    def __post_init__(self) -> None:
        """Refuse what gives no interval."""
        if not 0.0 < self.level < 1.0:
            raise UserError(f"an interval holds a share between 0 and 1, not {self.level}")
        if self.resamples < 1 or self.set_resamples < 2:
            raise UserError(
                f"the bootstrap takes at least 1 resample of cases and 2 of sets, not {self.resamples} and "
                f"{self.set_resamples}"
            )

    def of_mean(self, values: np.ndarray) -> Estimate:
        """Return the mean of ``(n,)`` finite values with its percentile interval."""
        return mean_interval(values, seed=self.seed, resamples=self.resamples, level=self.level)

    def mean_text(self) -> str:
        """Say how :meth:`of_mean` makes its interval."""
        return f"{self.level:.0%} percentile bootstrap over pictures, {self.resamples} resamples"


def case_score(
    name: str,
    family: Family,
    better: Better,
    values: np.ndarray,
    card: ScoreCard,
    bootstrap: Bootstrap,
    *,
    excluded: dict[str, int] | None = None,
    finish: Callable[[float], float] = lambda mean: mean,
    show: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> Score:
    """Make the score that is a mean over cases.

    Args:
        name: of the score.
        family: of the score.
        better: which direction.
        values: ``(n,)`` in the order of the cases; what is not finite is left out.
        card: of the score; pictures, exclusions and interval are filled in.
        bootstrap: how the interval is made.
        excluded: cases known to be left out, by reason; others that are not finite are counted as such.
        finish: monotonic map from the mean to the score, such as mean squared error to decibels.
        show: the same for each case.
    """
    kept = np.isfinite(values)
    excluded = dict(excluded or {})
    surprising = int(np.sum(~kept)) - sum(excluded.values())
    if surprising > 0:
        excluded["not a finite number"] = surprising
    filled = ScoreCard(
        **(
            card.to_dict()
            | {
                "pictures": int(np.sum(kept)),
                "excluded": excluded,
                "interval": bootstrap.mean_text() if np.sum(kept) > 1 else "none: one picture has none",
            }
        )
    )
    if not kept.any():
        nan = float("nan")
        why = f"not run: no case is left to score ({reasons(excluded)})"
        return Score(name, family, nan, nan, nan, filled, values, better, False, why)
    estimate = bootstrap.of_mean(values[kept])
    low, high = sorted((finish(estimate.low), finish(estimate.high)))
    if np.sum(kept) == 1:
        low = high = math.nan
    return Score(name, family, finish(estimate.value), low, high, filled, show(values), better)
