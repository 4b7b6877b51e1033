"""The toy benchmark in memory: edits with the right and with a shuffled exemplar, and their scores.

Two edits of a case have the same scene, mask and noise, so only the exemplar can tell them apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pbe.checkpoints.tower_weights import lite_weights
from pbe.editing.images import to_bytes, to_unit
from pbe.editing.pipeline import PaintByExample
from pbe.evaluation.benchmark.generation import GenerateSettings, at_scales, edit_batch
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.bootstrap import (
    CHOICE,
    LEVEL,
    RESAMPLES,
    Estimate,
    auc_interval,
    cosine,
    derangement,
    first_of,
    mean_interval,
    win_rate,
)
from pbe.evaluation.metrics.features import RESIZE_FILTER, TOWER, region, to_grey
from pbe.evaluation.metrics.towers import Tower
from pbe.evaluation.report.tables import Table
from pbe.models.codec import known_pixels

GUIDANCE = (1.0, 2.0, 3.0, 5.0)
FEATURE_BATCH = 64
Progress = Callable[[int, int], None]
Features = list[np.ndarray]  # two: of images in colour, and of the same turned grey


@dataclass(frozen=True)
class ToyEdits:
    """Edited images, uint8 ``n s s 3``, keyed by guidance scale.

    Attributes:
        own: scene i with exemplar i.
        shuffled: scene i with exemplar ``partner[i]``, from the same noise.
        partner: ``(n,)`` a permutation without fixed points.
        decoded: the true images, encoded and decoded: the best that the autoencoder lets through.
    """

    own: dict[float, np.ndarray]
    shuffled: dict[float, np.ndarray]
    partner: np.ndarray
    decoded: np.ndarray

    def rows(self, cases: Sequence[Case]) -> dict[str, list[np.ndarray]]:
        """Return labelled rows of images: masked, exemplar, edits by guidance, shuffled pair, true object."""
        last = list(self.own)[-1]
        rows = {"masked": [case.masked for case in cases], "exemplar": [case.exemplar for case in cases]}
        rows |= {f"guidance {scale:g}": list(edited) for scale, edited in self.own.items()}
        rows["shuffled exemplar"] = [cases[i].exemplar for i in self.partner]
        rows[f"its edit, guidance {last:g}"] = list(self.shuffled[last])
        rows["source: true object"] = [case.image for case in cases]
        return rows


def make_edits(
    pipe: PaintByExample,
    cases: Sequence[Case],
    scales: Sequence[float],
    settings: GenerateSettings,
    progress: Progress | None = None,
) -> ToyEdits:
    """Edit every case, at least two, twice at every guidance scale; the others are compared with the first.

    ``progress`` is called with (edits made, edits in all) after each batch.
    """
    partner = derangement(len(cases), settings.seed, "partner")
    total, made = 2 * len(scales) * len(cases), 0

    def count(edits: int) -> None:
        nonlocal made
        made += edits
        if progress is not None:
            progress(made, total)

    own: dict[float, np.ndarray] = {}
    shuffled: dict[float, np.ndarray] = {}
    others = [cases[i].exemplar for i in partner]
    for each in at_scales(settings, scales):
        own[each.guidance_scale] = edit_cases(pipe, cases, each, progress=count)
        shuffled[each.guidance_scale] = edit_cases(pipe, cases, each, others, progress=count)
    return ToyEdits(own, shuffled, partner, decode_images(pipe, cases, settings.batch_size))


def edit_cases(
    pipe: PaintByExample,
    cases: Sequence[Case],
    settings: GenerateSettings,
    exemplars: Sequence[np.ndarray] | None = None,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Edit cases of one size batch by batch, with their own or other exemplars; return uint8 ``n s s 3``.

    ``progress`` is told the number of edits of each batch.
    """
    batches, size = [], settings.batch_size
    for start in range(0, len(cases), size):
        part = slice(start, start + size)
        shown = None if exemplars is None else exemplars[part]
        batches.append(edit_batch(pipe, cases[part], settings, shown))
        if progress is not None:
            progress(len(batches[-1]))
    return np.concatenate(batches)


@torch.no_grad()
def decode_images(pipe: PaintByExample, cases: Sequence[Case], batch_size: int = 32) -> np.ndarray:
    """Return the true images encoded (posterior means) and decoded, uint8 ``n s s 3``."""
    model, decoded = pipe.model, []
    for start in range(0, len(cases), batch_size):
        part = cases[start : start + batch_size]
        images = torch.stack([torch.from_numpy(case.image) for case in part]).permute(0, 3, 1, 2)
        keep = torch.stack([torch.from_numpy(case.mask) for case in part])[:, None] <= 127
        pixels = (images.float() / 127.5 - 1.0).to(model.device, model.dtype)
        known = None
        if model.config.autoencoder.mask_aware_decoder:
            known = known_pixels(pixels, keep.to(pixels))
        painted = model.decode_latents(model.encode_images(pixels), known).float().clamp(-1.0, 1.0)
        decoded.append(to_bytes(to_unit(painted.permute(0, 2, 3, 1).cpu().numpy())))
    return np.concatenate(decoded)


@dataclass(frozen=True)
class Row:
    """Scores of one kind of edit; ``grey`` ones are of images turned grey, which leaves them shape alone.

    Attributes:
        auc: positives are painted regions against their exemplars, negatives the same regions painted
            with a shuffled exemplar against the exemplar that was not shown.
        grey_auc: the same in grey.
        first_of_20: share of painted regions that resemble their own exemplar more than 19 others, of other
            objects; None below 20 objects.
        grey_first_of_20: the same in grey.
        win_rate: share of scenes where the positive beats the negative of its own scene.
        similarity: mean cosine of the painted regions with their exemplars.
        shuffled: mean cosine of the negatives.
        gain: mean paired difference of similarity to the first guidance scale; None for that scale itself
            and for the ceilings.
    """

    auc: Estimate
    grey_auc: Estimate
    first_of_20: Estimate | None
    grey_first_of_20: Estimate | None
    win_rate: Estimate
    similarity: Estimate
    shuffled: Estimate
    gain: Estimate | None = None

    def cells(self) -> list[str]:
        """Return the scores as a table shows them."""
        return ["–" if value is None else str(value) for value in vars(self).values()]


class Scorer:
    """Turns sets of edits of the same cases into rows; the exemplars' features are made once.

    ``seed`` is that of the bootstrap.
    """

    def __init__(self, cases: Sequence[Case], tower: Tower, seed: int = 0) -> None:
        self.tower, self.seed = tower, seed
        self.masks = np.stack([case.mask for case in cases])
        self.exemplars = self._features([case.exemplar for case in cases])
        self._order = np.argsort([case.id for case in cases])  # that of the benchmark's folder

    def _features(self, images: Sequence[np.ndarray]) -> Features:
        found = []
        for shown in (images, [to_grey(image) for image in images]):
            batches = [shown[i : i + FEATURE_BATCH] for i in range(0, len(shown), FEATURE_BATCH)]
            found.append(np.concatenate([self.tower.squashed(batch) for batch in batches]))
        return found

    def regions(self, images: np.ndarray) -> Features:
        """Return the features of the masked regions of images, uint8 ``n s s 3``, in colour and in grey."""
        return self._features([region(image, mask) for image, mask in zip(images, self.masks, strict=True)])

    def similarity(self, regions: Features, partner: np.ndarray | None = None) -> Features:
        """Return the cosines ``(n,)`` of regions with their exemplars, or with their partners'."""
        pairs = zip(regions, self.exemplars, strict=True)
        return [cosine(painted, shown if partner is None else shown[partner]) for painted, shown in pairs]

    def row(self, regions: Features, negative: Features, base: np.ndarray | None = None) -> Row:
        """Score the features of what was painted with the cases' own exemplars.

        ``negative`` are the similarities ``(n,)`` of the negatives, ``base`` those in colour that the gain is
        over.
        """
        positive, seed = self.similarity(regions), self.seed
        auc, grey_auc = (auc_interval(*pair, seed=seed) for pair in zip(positive, negative, strict=True))
        first, grey_first = (self._first(*pair) for pair in zip(regions, self.exemplars, strict=True))
        return Row(
            auc,
            grey_auc,
            first,
            grey_first,
            win_rate=win_rate(positive[0], negative[0], seed=seed),
            similarity=mean_interval(positive[0], seed=seed),
            shuffled=mean_interval(negative[0], seed=seed),
            gain=None if base is None else mean_interval(positive[0] - base, seed=seed),
        )

    def _first(self, regions: np.ndarray, exemplars: np.ndarray) -> Estimate | None:
        if len(regions) < CHOICE:
            return None
        return mean_interval(first_of(regions[self._order], exemplars[self._order]), seed=self.seed)


@dataclass(frozen=True)
class ToyScores:
    """All scores of a model on the benchmark.

    Attributes:
        guidance: a row for each guidance scale, in the order in which they were edited.
        ceiling: the scene's true object against its own exemplar, and against the shuffled one.
        decoded: the same of the true object once encoded and decoded: the autoencoder's own ceiling.
        decoded_psnr: of those whole images, mean over them, dB.
        card: what the features are made with.
        objects: number of cases.
        cases_sha256: of all images, masks and exemplars of the benchmark.
        outside: largest difference of a pixel outside the mask, 0 to 255.
    """

    guidance: dict[float, Row]
    ceiling: Row
    decoded: Row
    decoded_psnr: float
    card: dict[str, Any]
    objects: int
    cases_sha256: str
    outside: int

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {
            "objects": self.objects,
            "cases_sha256": self.cases_sha256,
            "features": self.card,
            "intervals": {
                "method": "percentile bootstrap over objects",
                "level": LEVEL,
                "resamples": RESAMPLES,
            },
            "guidance": [{"guidance_scale": scale, **asdict(row)} for scale, row in self.guidance.items()],
            "ceiling": asdict(self.ceiling),
            "autoencoder_ceiling": asdict(self.decoded) | {"psnr": self.decoded_psnr},
            "largest_change_outside_mask": self.outside,
        }

    def table(self) -> Table:
        """Return the table of scores; intervals in brackets."""
        head = ["edit", "AUC", "AUC, grey", f"first of {CHOICE}", f"first of {CHOICE}, grey", "pairs won"]
        head += ["similarity", "if shuffled", f"gain over guidance {next(iter(self.guidance)):g}"]
        rows = [[f"guidance {scale:g}", *row.cells()] for scale, row in self.guidance.items()]
        rows.append(["autoencoder alone (its ceiling)", *self.decoded.cells()])
        rows.append(["true object (ceiling)", *self.ceiling.cells()])
        note = (
            f"{self.objects} objects; {self.card['tower']} features at {self.card['input_size']} px; in "
            f"brackets {LEVEL:.0%} bootstrap intervals over objects. Autoencoder alone: the true images "
            f"encoded and decoded, {self.decoded_psnr:.1f} dB. Largest change outside the mask: "
            f"{self.outside} of 255."
        )
        return Table(head, rows, note)


def score_edits(cases: Sequence[Case], edits: ToyEdits, tower: Tower, *, seed: int = 0) -> ToyScores:
    """Score edits of the benchmark with the tower ``lite2``; ``seed`` is that of the bootstrap."""
    images, scorer = np.stack([case.image for case in cases]), Scorer(cases, tower, seed)
    rows: dict[float, Row] = {}
    base: np.ndarray | None = None
    for scale, edited in edits.own.items():
        painted = scorer.regions(edited)
        rows[scale] = scorer.row(painted, scorer.similarity(scorer.regions(edits.shuffled[scale])), base)
        base = scorer.similarity(painted)[0] if base is None else base
    ceiling, decoded = (_true_row(scorer, each, edits.partner) for each in (images, edits.decoded))
    every = (*edits.own.values(), *edits.shuffled.values())
    outside = max(changed_outside(images, scorer.masks, edited) for edited in every)
    card = {
        "tower": TOWER,
        "weights": lite_weights(TOWER).name,
        "sha256": tower.sha256,
        "width": scorer.exemplars[0].shape[1],
        "input_size": tower.spec.size,
        "resize_filter": RESIZE_FILTER,
        "crop_rule": "bounding box of the mask, both axes stretched to the square; exemplars whole",
    }
    loss = mean_psnr(images, edits.decoded)
    return ToyScores(rows, ceiling, decoded, loss, card, len(cases), cases_hash(cases), outside)


def _true_row(scorer: Scorer, images: np.ndarray, partner: np.ndarray) -> Row:
    """Score images of the true objects; the negatives are the same against their partners' exemplars."""
    regions = scorer.regions(images)
    return scorer.row(regions, scorer.similarity(regions, partner))


def mean_psnr(images: np.ndarray, decoded: np.ndarray) -> float:
    """Return the mean over images of the peak signal-to-noise ratio, dB, each uint8 ``n h w 3``."""
    error = (images.astype(np.float64) - decoded.astype(np.float64)) ** 2
    return float(np.mean(10.0 * np.log10(255.0**2 / error.mean(axis=(1, 2, 3)).clip(1e-6))))


def changed_outside(images: np.ndarray, masks: np.ndarray, edited: np.ndarray) -> int:
    """Return the largest difference of two sets of images (uint8 ``n h w 3``) outside the masks."""
    difference = np.abs(images.astype(np.int16) - edited.astype(np.int16))
    return int(np.max(difference * (masks <= 127)[..., None]))


def cases_hash(cases: Sequence[Case]) -> str:
    """Return the SHA-256 of all images, masks and exemplars, which names the benchmark."""
    digest = hashlib.sha256()
    for case in cases:
        for array in (case.image, case.mask, case.exemplar):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
