"""The toy benchmark's scores: how well the painted region resembles its exemplar, and what that rests on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pbe.evaluation.estimates import (
    LEVEL,
    RESAMPLES,
    Estimate,
    auc_interval,
    cosine,
    mean_interval,
    win_rate,
)
from pbe.evaluation.metrics.features import FeatureCard, LiteFeatures
from pbe.evaluation.toy.benchmark import BenchmarkCase
from pbe.evaluation.toy.edits import BenchmarkEdits


@dataclass(frozen=True)
class Row:
    """Scores of one kind of edit.

    Attributes:
        auc: positives are painted regions against their exemplars, negatives the same regions painted
            with a shuffled exemplar against the exemplar that was not shown.
        win_rate: share of scenes where the positive beats the negative of its own scene.
        similarity: mean cosine of the painted regions with their exemplars.
        shuffled: mean cosine of the negatives.
        gain: mean paired difference of similarity to the first guidance scale; None for that scale itself
            and for the ceiling.
    """

    auc: Estimate
    win_rate: Estimate
    similarity: Estimate
    shuffled: Estimate
    gain: Estimate | None = None


@dataclass(frozen=True)
class Scores:
    """All scores of a model on the benchmark.

    Attributes:
        guidance: a row for each guidance scale, in the order in which they were edited.
        ceiling: the scene's true object against its own exemplar, and against the shuffled one.
        card: what the features are made with.
        objects: number of cases.
        cases_sha256: of all pictures, masks and exemplars of the benchmark.
        outside: largest difference of a pixel outside the mask, 0 to 255.
        own_similarity: cosines behind the rows, ``(n,)`` by scale.
    """

    guidance: dict[float, Row]
    ceiling: Row
    card: FeatureCard
    objects: int
    cases_sha256: str
    outside: int
    own_similarity: dict[float, np.ndarray]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary without the single cosines."""
        rows = [{"guidance_scale": scale, **asdict(row)} for scale, row in self.guidance.items()]
        intervals = {"method": "percentile bootstrap over objects", "level": LEVEL, "resamples": RESAMPLES}
        return {
            "objects": self.objects,
            "cases_sha256": self.cases_sha256,
            "features": self.card.to_dict(),
            "intervals": intervals,
            "guidance": rows,
            "ceiling": asdict(self.ceiling),
            "largest_change_outside_mask": self.outside,
        }


def score_edits(
    cases: Sequence[BenchmarkCase], edits: BenchmarkEdits, features: LiteFeatures, *, seed: int = 0
) -> Scores:
    """Score edits of the benchmark; ``seed`` is that of the bootstrap."""
    images, masks = np.stack([case.image for case in cases]), np.stack([case.mask for case in cases])
    exemplars = features.of_pictures([case.exemplar for case in cases])
    rows: dict[float, Row] = {}
    own: dict[float, np.ndarray] = {}
    for scale in edits.own:
        own[scale] = cosine(features.of_regions(edits.own[scale], masks), exemplars)
        negative = cosine(features.of_regions(edits.shuffled[scale], masks), exemplars)
        first = own[next(iter(own))] if rows else None
        rows[scale] = _row(own[scale], negative, first, seed)
    true = features.of_regions(images, masks)
    ceiling = _row(cosine(true, exemplars), cosine(true, exemplars[edits.partner]), None, seed)
    outside = max(
        changed_outside(images, masks, edited) for edited in (*edits.own.values(), *edits.shuffled.values())
    )
    return Scores(rows, ceiling, features.card, len(cases), cases_hash(cases), outside, own)


def _row(positive: np.ndarray, negative: np.ndarray, first: np.ndarray | None, seed: int) -> Row:
    return Row(
        auc=auc_interval(positive, negative, seed=seed),
        win_rate=win_rate(positive, negative, seed=seed),
        similarity=mean_interval(positive, seed=seed),
        shuffled=mean_interval(negative, seed=seed),
        gain=None if first is None else mean_interval(positive - first, seed=seed),
    )


def changed_outside(images: np.ndarray, masks: np.ndarray, edited: np.ndarray) -> int:
    """Return the largest difference of two sets of pictures (uint8 ``n h w 3``) outside the masks."""
    difference = np.abs(images.astype(np.int16) - edited.astype(np.int16))
    return int(np.max(difference * (masks <= 127)[..., None]))


def cases_hash(cases: Sequence[BenchmarkCase]) -> str:
    """Return the SHA-256 of all pictures, masks and exemplars, which names the benchmark."""
    digest = hashlib.sha256()
    for case in cases:
        for array in (case.image, case.mask, case.exemplar):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def score_table(scores: Scores) -> tuple[list[str], list[list[str]], str]:
    """Return head, rows and footnote of the table of scores, as texts; intervals in brackets."""
    first = next(iter(scores.guidance))
    head = ["edit", "AUC", "pairs won", "similarity", "if shuffled", f"gain over guidance {first:g}"]
    named = [(f"guidance {scale:g}", row) for scale, row in scores.guidance.items()]
    rows = []
    for name, row in [*named, ("true object (ceiling)", scores.ceiling)]:
        gain = "–" if row.gain is None else str(row.gain)
        scored = (row.auc, row.win_rate, row.similarity, row.shuffled)
        rows.append([name, *map(str, scored), gain])
    note = (
        f"{scores.objects} objects; {scores.card.tower} features at {scores.card.input_size} px; in brackets "
        f"{LEVEL:.0%} bootstrap intervals over objects. "
        f"Largest change outside the mask: {scores.outside} of 255."
    )
    return head, rows, note


def markdown_table(scores: Scores) -> str:
    """Return :func:`score_table` as Markdown."""
    head, rows, note = score_table(scores)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note, ""])
