"""Scores of whole sets of edits against real images: distances between the features of a tower."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from PIL import Image

from pbe.data.randomness import generator
from pbe.errors import UserError
from pbe.evaluation.metrics.base import Batch, Measure, Metric, Outcome, Score, reasons
from pbe.evaluation.metrics.bootstrap import Bootstrap, resample_counts
from pbe.evaluation.metrics.towers import Tower

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
# What Pillow raises for files that are no image, are damaged, or claim to be too large to be opened.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Distance:
    """A distance of two sets and the standard error that resampling the first gives it.

    ``floor`` is what a distance cannot be below, and its interval therefore does not go below either.
    """

    value: float
    error: float
    floor: float = -math.inf

    def interval(self, level: float) -> tuple[float, float]:
        """Return the ends of the normal interval that holds a share ``level``."""
        half = NormalDist().inv_cdf((1.0 + level) / 2) * self.error
        return math.nan if math.isnan(half) else max(self.value - half, self.floor), self.value + half


def _checked(features: np.ndarray, what: str) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise UserError(f"a distance of sets needs at least two images; the {what} have {len(features)}")
    if not np.all(np.isfinite(features)):
        raise UserError(f"features of the {what} are not finite; check images and weights")
    return features


def _root(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of features ``(n, d)``, and ``b``, ``(d, at most d)``; ``b b^T`` is the covariance."""
    mean = features.mean(axis=0)
    factor = (features - mean).T / np.sqrt(len(features) - 1)
    if factor.shape[1] > factor.shape[0]:
        factor = np.asarray(np.linalg.qr(factor.T, mode="r")).T
    return mean, factor


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` (Dowson and Landau 1982, eq. 4).

    The trace of the root is the sum of the singular values of the product of the covariances' factors,
    which needs no matrix root and holds for singular covariances too. ``a`` is ``(n, d)``, ``b`` ``(m, d)``.
    """
    a, b = _pair(a, b)
    (mean_a, root_a), (mean_b, root_b) = _root(a), _root(b)
    traces = np.sum(root_a**2) + np.sum(root_b**2)
    overlap = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + traces - 2.0 * overlap)


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = _checked(a, "edits"), _checked(b, "reference images")
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features of {a.shape[1]} and of {b.shape[1]} numbers cannot be compared")
    return a, b


def frechet(a: np.ndarray, b: np.ndarray, bootstrap: Bootstrap) -> Distance:
    """Return :func:`frechet_distance` with its standard error over the rows of ``a``.

    The error is that of the jackknife over ``bootstrap.set_resamples`` groups of rows (Efron and Tibshirani
    1993, section 11.5): a bootstrap draws rows twice, which takes rank from the covariance and
    misleads where there are fewer images than features.
    """
    value = frechet_distance(a, b)
    a, b = _pair(a, b)
    mean_b, root_b = _root(b)
    trace_b, projected = float(np.sum(root_b**2)), a @ root_b
    squares = np.sum(a**2, axis=1)
    found = []
    for kept in leave_groups_out(len(a), bootstrap.set_resamples, bootstrap.seed):
        count = int(kept.sum())
        mean, unbias = a[kept].mean(axis=0), count / (count - 1)
        trace = (float(squares[kept].mean()) - float(mean @ mean)) * unbias
        centred = (projected[kept] - projected[kept].mean(axis=0)) * math.sqrt(unbias / count)
        gram = centred @ centred.T if centred.shape[0] <= centred.shape[1] else centred.T @ centred
        overlap = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0)).sum()
        found.append(float(np.sum((mean - mean_b) ** 2)) + trace + trace_b - 2.0 * overlap)
    groups = len(found)
    error = math.sqrt((groups - 1) * float(np.var(found))) if groups > 1 else math.nan
    return Distance(value, error, floor=0.0)


def leave_groups_out(count: int, groups: int, seed: int) -> Iterator[np.ndarray]:
    """Yield which of ``count`` rows remain without each of ``groups`` random groups, bool ``(count,)``.

    Nothing comes of fewer than three rows, of which no two would remain.
    """
    order = generator(seed, "jackknife", count, groups).permutation(count)
    for group in np.array_split(order, min(groups, count)) if count > 2 else ():
        kept = np.ones(count, bool)
        kept[group] = False
        yield kept


def kernel_sums(a: np.ndarray, b: np.ndarray, rows: int = 1024) -> np.ndarray:
    """Return the mean over ``b`` of the cubic kernel ``(x y / d + 1)^3`` for each row of ``a``, ``(n,)``."""
    parts = [np.mean((a[i : i + rows] @ b.T / a.shape[1] + 1.0) ** 3, axis=1) for i in range(0, len(a), rows)]
    return np.concatenate(parts)


def _off_diagonal_mean(a: np.ndarray) -> float:
    own = (np.sum(a**2, axis=1) / a.shape[1] + 1.0) ** 3
    n = len(a)
    return float(np.sum(kernel_sums(a, a) * n - own) / (n * (n - 1)))


def kernel(a: np.ndarray, b: np.ndarray, bootstrap: Bootstrap) -> Distance:
    """Return the unbiased squared maximum mean discrepancy under the cubic kernel (Binkowski et al. 2018).

    All pairs are taken at once; the customary mean over random subsets estimates the same with more noise.
    ``a`` is ``(n, d)``, ``b`` ``(m, d)``; the standard error is over the rows of ``a``. An image that a
    resample draws twice is not compared with itself.
    """
    a, b = _pair(a, b)
    within = (a @ a.T / a.shape[1] + 1.0) ** 3
    np.fill_diagonal(within, 0.0)
    across, constant = kernel_sums(a, b), _off_diagonal_mean(b)
    found = []
    for counts in resample_counts(len(a), bootstrap.set_resamples, bootstrap.seed):
        pairs = counts.sum() ** 2 - np.sum(counts**2)
        if pairs == 0.0:  # one image alone, again and again: only very small sets can draw that
            continue
        found.append(counts @ within @ counts / pairs + constant - 2.0 * (counts @ across) / counts.sum())
    value = float(within.sum() / (len(a) * (len(a) - 1))) + constant - 2.0 * float(across.mean())
    return Distance(value, float(np.std(found, ddof=1)) if len(found) > 1 else math.nan)


Compare = Callable[[np.ndarray, np.ndarray, Bootstrap], Distance]


class SetMeasure(Measure):
    """A distance between the features of all whole edits and those of real images.

    With ``own_reference`` these are the true images of the cases, since no others are given.
    """

    def __init__(self, tower: Tower, compare: Compare, own_reference: bool, notes: str) -> None:
        self.tower, self.compare = tower, compare
        self.own_reference, self.notes = own_reference, notes
        self.edits: list[np.ndarray] = []
        self.real: list[np.ndarray] = []

    def update(self, batch: Batch) -> None:
        """Collect the features of edits, and of true images where they are the reference."""
        self.edits.append(edit_features(self.tower, batch))
        if self.own_reference:
            images = [case.image for case in batch.cases]
            self.real.append(batch.shared(self.tower.key, "true images", lambda: self.tower.whole(images)))

    def update_reference(self, batch: Batch) -> None:
        """Collect the features of real images."""
        self.real.append(edit_features(self.tower, batch))

    def finish(self, metric: Metric, outcome: Outcome) -> list[Score]:
        """Measure the distance; fewer than two images have none, nor have features that are not finite."""
        features, real = np.concatenate(self.edits), np.concatenate(self.real)
        finite = np.isfinite(features).all(axis=1)
        excluded = dict(outcome.excluded)
        if not finite.all():
            excluded["features not finite"] = int(np.sum(~finite))
        features = features[finite]
        bootstrap = outcome.bootstrap
        source = "the cases' own true images" if self.own_reference else "a folder"
        card = self.tower.card(
            "whole images",
            resize_filter=self.tower.whole_filter,
            pictures=len(features),
            excluded=excluded,
            reference_sha256=outcome.cases_sha256 if self.own_reference else outcome.reference_sha256,
            interval=f"{bootstrap.level:.0%} normal, standard error of {bootstrap.set_resamples} "
            "resamples of the edits",
            notes=f"{self.notes}{'; ' if self.notes else ''}{len(real)} real images from {source}",
        )
        broken = int(np.sum(~np.isfinite(real).all(axis=1)))
        if broken:
            why = f"features of {broken} of {len(real)} real images are not finite; check the weights"
            return metric.not_run(why, card)
        if min(len(features), len(real)) < 2:
            why = f"needs at least two images on either side, not {len(features)} and {len(real)}"
            return metric.not_run(why + (f" ({reasons(excluded)})" if excluded else ""), card)
        found = self.compare(features, real, bootstrap)
        low, high = found.interval(bootstrap.level)
        return [Score(metric.name, metric.family, found.value, low, high, card, None, metric.better)]


def edit_features(tower: Tower, batch: Batch) -> np.ndarray:
    """Return the features of a batch's whole edits, made once however many scores ask."""
    return batch.shared(tower.key, "edits", lambda: tower.whole(batch.edits))


class ImageFolder:
    """The images right in a folder (PNG, JPEG or WebP), in the order of their names."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"the reference '{folder}' is not a folder of images")
        self.paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise UserError(f"the reference folder '{folder}' holds no image")
        self.digest = hashlib.sha256()

    def batches(self, size: int) -> Iterator[Batch]:
        """Read all images, batch by batch, and hash names and bytes on the way."""
        for start in range(0, len(self.paths), size):
            images = []
            for path in self.paths[start : start + size]:
                images.append(read_image(path))
                self.digest.update(path.name.encode() + b"\0" + path.read_bytes())
            yield Batch(list(range(start, start + len(images))), [], images)


def read_image(path: Path, mode: str = "RGB") -> np.ndarray:
    """Read an image as uint8, ``h w 3`` for mode ``RGB``, ``h w`` for ``L``."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode))
    except UNREADABLE as error:
        raise UserError(f"'{path}' cannot be read as an image: {error}") from error
