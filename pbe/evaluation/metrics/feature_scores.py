"""Scores of single edits from the features of a tower: likeness to the exemplar, and quality.

The cosines of region and exemplar are the paper's, whose crop loses a row and a column, and corrected ones.
The quality score (QS) is how likely an edit's features are under a Gaussian mixture of real images', kept as
plain tensors (safetensors). The authors' own is a pickle, which is not read.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn import functional as F

from pbe.errors import UserError
from pbe.evaluation.metrics.base import (
    Batch,
    CaseMeasure,
    Measure,
    Metric,
    Outcome,
    Score,
)
from pbe.evaluation.metrics.bootstrap import CHOICE, cosines, first_of
from pbe.evaluation.metrics.sets import edit_features
from pbe.evaluation.metrics.towers import Tower, region, to_grey
from pbe.files import sha256_of, write_output

CORRECT_RULE = "bounding box of the mask's pixels above 127, whole; exemplars whole"
PAPER_RULE = (
    "from the first to the last pixel equal to 255 in raster order, the last row and column left out; "
    "exemplars whole"
)
PAPER_FILTER = "region: bilinear without antialias, once normalised; exemplar: Pillow's bicubic, before that"
FIRST_OF = f"toy-first-of-{CHOICE}"
FIRST_OF_SCORES = (FIRST_OF, f"{FIRST_OF}-grey", f"{FIRST_OF}-true", f"{FIRST_OF}-grey-true")
FIRST_OF_NOTES = (
    f"own exemplar before {CHOICE - 1} of other cases, drawn by place among the cases that were scored"
)


def raster_crop(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the crop ``(x1, y1, x2, y2)`` of a mask (uint8 ``h w``) as the paper's script makes it.

    Its corners are the first and the last pixel equal to 255 in raster order, and both ends are excluded
    though they belong to the masked region: right for boxes but for their last row and column, and possibly
    empty for other shapes.
    """
    white = np.argwhere(mask == 255)
    if not len(white):
        return 0, 0, 0, 0
    (y1, x1), (y2, x2) = white[0].tolist(), white[-1].tolist()
    return x1, y1, x2, y2


def paper_cosines(tower: Tower, batch: Batch) -> np.ndarray:
    """Return the paper's region similarity, a hundred times the cosine; NaN where its crop is empty."""
    size = tower.spec.size
    regions, kept = [], []
    for position, (case, edit) in enumerate(zip(batch.cases, batch.edits, strict=True)):
        x1, y1, x2, y2 = raster_crop(case.mask)
        if x2 <= x1 or y2 <= y1:
            continue
        cut = tower.normalise(edit)[None, :, y1:y2, x1:x2]
        regions.append(F.interpolate(cut, size=(size, size), mode="bilinear", align_corners=False)[0])
        kept.append(position)
    values = np.full(len(batch.cases), np.nan)
    if kept:
        values[kept] = 100.0 * cosines(tower.run(regions), _exemplars(tower, batch)[kept])
    return values


def correct_cosines(tower: Tower, batch: Batch) -> np.ndarray:
    """Return the cosine of the whole region's features with the exemplar's, both shown alike."""

    def make() -> np.ndarray:
        return tower.squashed([region(e, c.mask) for e, c in zip(batch.edits, batch.cases, strict=True)])

    return cosines(batch.shared(tower.key, "regions", make), _exemplars(tower, batch))


def _exemplars(tower: Tower, batch: Batch) -> np.ndarray:
    exemplars = [case.exemplar for case in batch.cases]
    return batch.shared(tower.key, "exemplars", lambda: tower.squashed(exemplars))


def region_measure(tower: Tower, scale: float = 1.0) -> CaseMeasure:
    """Make a region similarity with the corrected crop, ``scale`` (the paper's is 100) times the cosine."""
    notes = "cosine" if scale == 1.0 else f"cosine x {scale:g}"
    card = tower.card(CORRECT_RULE, notes=notes)
    return CaseMeasure(lambda batch: scale * correct_cosines(tower, batch), card)


def paper_region_measure(tower: Tower) -> CaseMeasure:
    """Make the paper's region CLIP score, a hundred times the cosine."""
    card = tower.card(PAPER_RULE, resize_filter=PAPER_FILTER, notes="cosine x 100")
    return CaseMeasure(lambda batch: paper_cosines(tower, batch), card)


class FirstOfMeasure(Measure):
    """Is the right exemplar the most similar of twenty? Of edits and true objects, in colour and in grey.

    It collects the features of regions and exemplars, and compares them when all are there.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.positions: list[int] = []
        self.features: dict[tuple[str, bool], list[np.ndarray]] = {}  # by view, and whether in grey

    def update(self, batch: Batch) -> None:
        """Make the features of a batch."""
        self.positions += batch.positions
        views = {
            "exemplars": [case.exemplar for case in batch.cases],
            "regions": [region(edit, c.mask) for edit, c in zip(batch.edits, batch.cases, strict=True)],
            "true regions": [region(case.image, case.mask) for case in batch.cases],
        }
        for (view, images), grey in itertools.product(views.items(), (False, True)):
            shown = [to_grey(one) for one in images] if grey else images
            name = f"{view}, grey" if grey else view
            made = batch.shared(self.tower.key, name, partial(self.tower.squashed, shown))
            self.features.setdefault((view, grey), []).append(made)

    def finish(self, metric: Metric, outcome: Outcome) -> list[Score]:
        """Make the four scores; fewer cases than there are to choose from have none."""
        card = self.tower.card(CORRECT_RULE, reference_sha256=outcome.cases_sha256, notes=FIRST_OF_NOTES)
        count = len(self.positions)
        if count < CHOICE:
            return metric.not_run(f"needs at least {CHOICE} cases, not {count}", card)
        values = np.full((len(metric.scores), outcome.count), np.nan)
        views = itertools.product(("regions", "true regions"), (False, True))  # in the order of the scores
        for row, (view, grey) in zip(values, views, strict=True):
            regions, exemplars = (np.concatenate(self.features[each, grey]) for each in (view, "exemplars"))
            row[self.positions] = first_of(regions, exemplars)
        return metric.case_scores(values, card, outcome)


COMPONENTS = 20
SCALE = 300.0  # of the log-likelihood, in the released script
BATCH = 50  # of the released script, which drops what is left over
FORMAT = "pbe-gaussian-mixture"


@dataclass(frozen=True)
class Mixture:
    """A mixture of ``k`` Gaussians with full covariances over ``d`` numbers, all float64.

    Attributes:
        weights: ``(k,)``, sum 1.
        means: ``(k, d)``.
        cholesky: ``(k, d, d)`` lower factors of the covariances.
        card: strings that say what it was fitted on, among them ``feature_model`` and ``weights_sha256``.
    """

    weights: np.ndarray
    means: np.ndarray
    cholesky: np.ndarray
    card: dict[str, str]

    def log_likelihood(self, features: np.ndarray) -> np.ndarray:
        """Return the natural log-likelihood of each row of ``(n, d)`` features, ``(n,)``."""
        x = np.asarray(features, np.float64)
        if x.shape[1] != self.means.shape[1]:
            raise UserError(
                f"the mixture is of {self.means.shape[1]} numbers an image, the features are of {x.shape[1]}"
            )
        log_parts = np.stack([self._log_part(x, index) for index in range(len(self.weights))])
        peak = log_parts.max(axis=0)
        return np.asarray(peak + np.log(np.exp(log_parts - peak).sum(axis=0)))

    def _log_part(self, x: np.ndarray, index: int) -> np.ndarray:
        factor = torch.from_numpy(self.cholesky[index])
        offset = torch.from_numpy((x - self.means[index]).T.copy())
        white = torch.linalg.solve_triangular(factor, offset, upper=False).numpy()
        log_det = float(np.log(np.diagonal(self.cholesky[index])).sum())
        constant = 0.5 * x.shape[1] * math.log(2 * math.pi)
        return np.log(self.weights[index]) - 0.5 * np.sum(white**2, axis=0) - log_det - constant

    def save(self, path: Path) -> None:
        """Write it as safetensors; the file appears under its name only when it is complete."""
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(self, name), np.float64))
            for name in ("weights", "means", "cholesky")
        }
        write_output(path, save(tensors, metadata={"format": FORMAT, "card": json.dumps(self.card)}))


def load_mixture(path: Path) -> Mixture:
    """Read a mixture."""
    if not path.is_file():
        raise UserError(f"there is no mixture '{path}'; pbe fit makes one")
    stranger = f"'{path}' was not made by pbe fit"
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise UserError(stranger)
            card = json.loads(about.get("card", ""))
            weights, means, factors = (
                file.get_tensor(n).double().numpy() for n in ("weights", "means", "cholesky")
            )
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        hint = "pickles are not read; fit one with pbe fit"
        raise UserError(f"'{path}' cannot be read as a mixture ({hint})") from error
    k, d = means.shape if means.ndim == 2 else (0, 0)
    shapes = (weights.shape, factors.shape)
    if not isinstance(card, dict) or not k or shapes != ((k,), (k, d, d)):
        raise UserError(f"{stranger}: its numbers or its card are of another form")
    return Mixture(weights, means, factors, card)


def check_fit(images: int, components: int, seed: int) -> None:
    """Check what a fit needs before features are made; the seed of its start is 0 to 2**32 - 1."""
    if find_spec("sklearn") is None:
        raise UserError("fitting a mixture needs scikit-learn: pip install 'pbe[evaluation]'")
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed of the fit is 0 to 2**32 - 1, not {seed}")
    if images <= components:
        raise UserError(f"{components} components need more than {images} images")


def fit_mixture(
    features: np.ndarray, card: dict[str, str], *, components: int = COMPONENTS, seed: int = 0
) -> Mixture:
    """Fit a mixture by scikit-learn's expectation maximisation, with its defaults, as the original did.

    There must be more rows of features, ``(n, d)``, than components.
    """
    check_fit(len(features), components, seed)
    if not np.isfinite(features).all():
        raise UserError("some features are not finite; check images and weights")
    from sklearn.mixture import GaussianMixture

    fitted = GaussianMixture(components, covariance_type="full", random_state=seed)
    try:
        fitted.fit(np.asarray(features, np.float64))
        factors = np.linalg.cholesky(fitted.covariances_)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise UserError(f"the fit fails; try fewer components or more images: {error}") from error
    return Mixture(fitted.weights_, fitted.means_, factors, card)


def quality(log_likelihood: np.ndarray) -> np.ndarray:
    """Return the original's quality of each image, 0 to 100: ``clip(log-likelihood / 300, 0, 1) x 100``."""
    return 100.0 * np.clip(np.asarray(log_likelihood, np.float64) / SCALE, 0.0, 1.0)


class QualityMeasure(CaseMeasure):
    """QS, with CLIP's tower and the mixture of a file.

    ``drop_remainder`` leaves out the last cases that fill no batch of fifty, as the original does.
    """

    def __init__(self, tower: Tower, path: Path, drop_remainder: bool) -> None:
        self.mixture, self.drop_remainder = load_mixture(path), drop_remainder
        fitted = self.mixture.card.get("weights_sha256", "")
        if fitted != tower.sha256:
            raise UserError(
                f"the mixture '{path}' was fitted to features of other weights ({fitted[:12]}...)"
            )
        for key, own in (("feature_model", tower.spec.architecture), ("resize_filter", tower.whole_filter)):
            if (noted := self.mixture.card.get(key, own)) != own:  # one file of weights may suit two networks
                raise UserError(f"the mixture '{path}' is of the features of '{noted}', not '{own}'")
        card = tower.card(
            "whole images",
            resize_filter=tower.whole_filter,
            reference_sha256=sha256_of(path),
            notes=f"mixture of {len(self.mixture.weights)} Gaussians, whose file's hash the reference is"
            + ("; in batches of 50, the remainder dropped" if drop_remainder else ""),
        )

        def measure(batch: Batch) -> np.ndarray:
            """Return each edit's quality, NaN where its features are not finite."""
            features = edit_features(tower, batch)
            finite = np.isfinite(features).all(axis=1)
            values = np.full(len(features), np.nan)
            values[finite] = quality(self.mixture.log_likelihood(features[finite]))
            return values

        super().__init__(measure, card)

    def finish(self, metric: Metric, outcome: Outcome) -> list[Score]:
        """Average over the cases, but for the remainder where it is dropped."""
        over = len(self.values) % BATCH if self.drop_remainder else 0
        if over:
            for position in sorted(self.values)[-over:]:
                del self.values[position]
            reason = f"after the last whole batch of {BATCH}"
            outcome = outcome.with_excluded(reason, over)
        scores = super().finish(metric, outcome)
        if over and not self.values:
            why = f"not run: it is made of whole batches of {BATCH} images, and there are {over}"
            return [replace(one, why_not=why) for one in scores]
        return scores
