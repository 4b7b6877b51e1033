"""Scores of whole sets of edits against real images, from the features of a tower."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.metrics.base import Batch, Measure, Metric, Outcome, Score, ScoreCard, reasons
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.frechet import Distance
from pbe.evaluation.metrics.towers import Tower

Compare = Callable[[np.ndarray, np.ndarray, Bootstrap], Distance]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
# What Pillow raises for files that are no image, are damaged, or claim to be too large to be opened.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


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
        card = self._card(len(features), len(real), excluded, outcome)
        broken = int(np.sum(~np.isfinite(real).all(axis=1)))
        if broken:
            why = f"features of {broken} of {len(real)} real images are not finite; check the weights"
            return metric.not_run(why, card)
        if min(len(features), len(real)) < 2:
            why = f"needs at least two images on either side, not {len(features)} and {len(real)}"
            return metric.not_run(why + (f" ({reasons(excluded)})" if excluded else ""), card)
        found = self.compare(features, real, outcome.bootstrap)
        low, high = found.interval(outcome.bootstrap.level)
        return [Score(metric.name, metric.family, found.value, low, high, card, None, metric.better)]

    def _card(self, edits: int, real: int, excluded: dict[str, int], outcome: Outcome) -> ScoreCard:
        source = "the cases' own true images" if self.own_reference else "a folder"
        bootstrap = outcome.bootstrap
        return ScoreCard(
            feature_model=self.tower.spec.architecture,
            weights_sha256=self.tower.sha256,
            resize_filter=self.tower.whole_filter,
            crop_rule="whole images",
            pictures=edits,
            excluded=excluded,
            reference_sha256=outcome.cases_sha256 if self.own_reference else outcome.reference_sha256,
            interval=f"{bootstrap.level:.0%} normal, standard error of {bootstrap.set_resamples} "
            "resamples of the edits",
            notes=f"{self.notes}{'; ' if self.notes else ''}{real} real images from {source}",
        )


def edit_features(tower: Tower, batch: Batch) -> np.ndarray:
    """Return the features of a batch's whole edits, made once however many scores ask."""
    return batch.shared(tower.key, "edits", lambda: tower.whole(batch.edits))


class ImageFolder:
    """The images right in a folder (PNG, JPEG or WebP), in the order of their names."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"the reference '{folder}' is no folder of images")
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
