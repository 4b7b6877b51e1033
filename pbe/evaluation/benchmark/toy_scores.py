"""The toy benchmark's scores: how well the painted region resembles its exemplar, and what that rests on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pbe.evaluation.benchmark.toy import BenchmarkCase
from pbe.evaluation.benchmark.toy_edits import BenchmarkEdits
from pbe.evaluation.metrics.bootstrap import (
    CHOICE,
    LEVEL,
    RESAMPLES,
    Estimate,
    auc_interval,
    cosine,
    first_of,
    mean_interval,
    win_rate,
)
from pbe.evaluation.metrics.features import FeatureCard, LiteFeatures

Features = list[np.ndarray]  # two: of images in colour, and of the same turned grey


@dataclass(frozen=True)
class Row:
    """Scores of one kind of edit; ``grey`` ones are of images turned grey, which leaves them shape alone.

    Attributes:
        auc: positives are painted regions against their exemplars, negatives the same regions painted
            with a shuffled exemplar against the exemplar that was not shown.
        grey_auc: the same in grey.
        first: share of painted regions that resemble their own exemplar more than 19 others, of other
            objects; None below 20 objects.
        grey_first: the same in grey.
        win_rate: share of scenes where the positive beats the negative of its own scene.
        similarity: mean cosine of the painted regions with their exemplars.
        shuffled: mean cosine of the negatives.
        gain: mean paired difference of similarity to the first guidance scale; None for that scale itself
            and for the ceilings.
    """

    auc: Estimate
    grey_auc: Estimate
    first: Estimate | None
    grey_first: Estimate | None
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
        decoded: the same of the true object once encoded and decoded: the autoencoder's own ceiling.
        decoded_psnr: of those whole images, mean over them, dB.
        card: what the features are made with.
        objects: number of cases.
        cases_sha256: of all pictures, masks and exemplars of the benchmark.
        outside: largest difference of a pixel outside the mask, 0 to 255.
        own_similarity: cosines behind the rows, ``(n,)`` by scale.
    """

    guidance: dict[float, Row]
    ceiling: Row
    decoded: Row
    decoded_psnr: float
    card: FeatureCard
    objects: int
    cases_sha256: str
    outside: int
    own_similarity: dict[float, np.ndarray]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary without the single cosines."""
        rows = [{"guidance_scale": scale, **row_dict(row)} for scale, row in self.guidance.items()]
        intervals = {"method": "percentile bootstrap over objects", "level": LEVEL, "resamples": RESAMPLES}
        return {
            "objects": self.objects,
            "cases_sha256": self.cases_sha256,
            "features": self.card.to_dict(),
            "intervals": intervals,
            "guidance": rows,
            "ceiling": row_dict(self.ceiling),
            "autoencoder_ceiling": row_dict(self.decoded) | {"psnr": self.decoded_psnr},
            "largest_change_outside_mask": self.outside,
        }


def row_dict(row: Row) -> dict[str, Any]:
    """Return a row as a JSON-ready dictionary, ``first`` under the name ``first_of_20``."""
    values = asdict(row)
    return {name.replace("first", f"first_of_{CHOICE}"): value for name, value in values.items()}


class Scorer:
    """Turns sets of edits of the same cases into rows; the exemplars' features are made once.

    Args:
        cases: of the benchmark.
        features: makes the features.
        seed: of the bootstrap.
    """

    def __init__(self, cases: Sequence[BenchmarkCase], features: LiteFeatures, seed: int = 0) -> None:
        self.features, self.seed = features, seed
        self.masks = np.stack([case.mask for case in cases])
        shown = [case.exemplar for case in cases]
        self.exemplars: Features = [features.of_pictures(shown, grey=grey) for grey in (False, True)]
        self._order = np.argsort([case.index for case in cases])  # that of the benchmark's folder

    def regions(self, images: np.ndarray) -> Features:
        """Return the features of the masked regions of images, uint8 ``n s s 3``, in colour and in grey."""
        return [self.features.of_regions(images, self.masks, grey=grey) for grey in (False, True)]

    def similarity(self, regions: Features, partner: np.ndarray | None = None) -> Features:
        """Return the cosines ``(n,)`` of regions with their exemplars, or with their partners'."""
        pairs = zip(regions, self.exemplars, strict=True)
        return [cosine(painted, shown if partner is None else shown[partner]) for painted, shown in pairs]

    def row(self, regions: Features, negative: Features, base: np.ndarray | None = None) -> Row:
        """Score one kind of edit.

        Args:
            regions: features of what was painted with the cases' own exemplars.
            negative: similarities ``(n,)`` of the negatives.
            base: similarities ``(n,)`` in colour that the gain is over.
        """
        positive, seed = self.similarity(regions), self.seed
        auc, grey_auc = (auc_interval(*pair, seed=seed) for pair in zip(positive, negative, strict=True))
        first, grey_first = (self._first(*pair) for pair in zip(regions, self.exemplars, strict=True))
        return Row(
            auc=auc,
            grey_auc=grey_auc,
            first=first,
            grey_first=grey_first,
            win_rate=win_rate(positive[0], negative[0], seed=seed),
            similarity=mean_interval(positive[0], seed=seed),
            shuffled=mean_interval(negative[0], seed=seed),
            gain=None if base is None else mean_interval(positive[0] - base, seed=seed),
        )

    def _first(self, regions: np.ndarray, exemplars: np.ndarray) -> Estimate | None:
        if len(regions) < CHOICE:
            return None
        return mean_interval(first_of(regions[self._order], exemplars[self._order]), seed=self.seed)


def score_edits(
    cases: Sequence[BenchmarkCase], edits: BenchmarkEdits, features: LiteFeatures, *, seed: int = 0
) -> Scores:
    """Score edits of the benchmark; ``seed`` is that of the bootstrap."""
    images, scorer = np.stack([case.image for case in cases]), Scorer(cases, features, seed)
    rows: dict[float, Row] = {}
    own: dict[float, np.ndarray] = {}
    for scale in edits.own:
        painted = scorer.regions(edits.own[scale])
        negative = scorer.similarity(scorer.regions(edits.shuffled[scale]))
        own[scale] = scorer.similarity(painted)[0]
        rows[scale] = scorer.row(painted, negative, own[next(iter(own))] if rows else None)
    ceiling, decoded = (_true_row(scorer, each, edits.partner) for each in (images, edits.decoded))
    outside = max(
        changed_outside(images, scorer.masks, edited)
        for edited in (*edits.own.values(), *edits.shuffled.values())
    )
    loss = mean_psnr(images, edits.decoded)
    return Scores(rows, ceiling, decoded, loss, features.card, len(cases), cases_hash(cases), outside, own)


def _true_row(scorer: Scorer, images: np.ndarray, partner: np.ndarray) -> Row:
    """Score images of the true objects; the negatives are the same against their partners' exemplars."""
    regions = scorer.regions(images)
    return scorer.row(regions, scorer.similarity(regions, partner))


def mean_psnr(images: np.ndarray, decoded: np.ndarray) -> float:
    """Return the mean over images of the peak signal-to-noise ratio, dB, each uint8 ``n h w 3``."""
    error = (images.astype(np.float64) - decoded.astype(np.float64)) ** 2
    return float(np.mean(10.0 * np.log10(255.0**2 / error.mean(axis=(1, 2, 3)).clip(1e-6))))


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
    base = next(iter(scores.guidance))
    choices = [f"first of {CHOICE}", f"first of {CHOICE}, grey"]
    head = ["edit", "AUC", "AUC, grey", *choices, "pairs won", "similarity", "if shuffled"]
    head.append(f"gain over guidance {base:g}")
    named = [(f"guidance {scale:g}", row) for scale, row in scores.guidance.items()]
    named += [("autoencoder alone (its ceiling)", scores.decoded), ("true object (ceiling)", scores.ceiling)]
    rows = []
    for name, row in named:
        scored = (
            row.auc,
            row.grey_auc,
            row.first,
            row.grey_first,
            row.win_rate,
            row.similarity,
            row.shuffled,
        )
        rows.append([name, *("–" if value is None else str(value) for value in (*scored, row.gain))])
    note = (
        f"{scores.objects} objects; {scores.card.tower} features at {scores.card.input_size} px; in brackets "
        f"{LEVEL:.0%} bootstrap intervals over objects. Autoencoder alone: the true images encoded and "
        f"decoded, {scores.decoded_psnr:.1f} dB. Largest change outside the mask: {scores.outside} of 255."
    )
    return head, rows, note


def markdown_table(scores: Scores) -> str:
    """Return :func:`score_table` as Markdown."""
    head, rows, note = score_table(scores)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note, ""])
