"""Scores of whole sets of edits against real pictures, from the features of a tower."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.metrics.frechet import Distance
from pbe.evaluation.metrics.measures import Batch, Measure, Outcome
from pbe.evaluation.metrics.results import Bootstrap, Family, Score, ScoreCard, not_run, reasons
from pbe.evaluation.metrics.towers import Tower

Compare = Callable[[np.ndarray, np.ndarray, Bootstrap], Distance]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class SetMeasure(Measure):
    """A distance between the features of all edits and those of real pictures.

    Args:
        name: of the score.
        family: of the score.
        tower: makes the features of whole pictures.
        compare: the distance.
        own_reference: take the true pictures of the cases, since no other real pictures are given.
        notes: for the card.
    """

    def __init__(
        self, name: str, family: Family, tower: Tower, compare: Compare, own_reference: bool, notes: str
    ) -> None:
        self.name, self.family, self.tower, self.compare = name, family, tower, compare
        self.own_reference, self.notes = own_reference, notes
        self.edits: list[np.ndarray] = []
        self.real: list[np.ndarray] = []

    def update(self, batch: Batch) -> None:
        """Collect the features of edits, and of true pictures where they are the reference."""
        self.edits.append(edit_features(self.tower, batch))
        if self.own_reference:
            images = [case.image for case in batch.cases]
            self.real.append(batch.shared(self.tower.key, "true pictures", lambda: self.tower.whole(images)))

    def update_reference(self, batch: Batch) -> None:
        """Collect the features of real pictures."""
        self.real.append(edit_features(self.tower, batch))

    def finish(self, outcome: Outcome) -> list[Score]:
        """Measure the distance; fewer than two pictures have none, nor have features that are not finite."""
        features, real = np.concatenate(self.edits), np.concatenate(self.real)
        finite = np.isfinite(features).all(axis=1)
        excluded = dict(outcome.excluded)
        if not finite.all():
            excluded["features not finite"] = int(np.sum(~finite))
        features = features[finite]
        broken = int(np.sum(~np.isfinite(real).all(axis=1)))
        why = ""
        if broken:
            why = f"features of {broken} of {len(real)} real pictures are not finite; check the weights"
        elif min(len(features), len(real)) < 2:
            why = f"needs at least two pictures on either side, not {len(features)} and {len(real)}"
            why += f" ({reasons(excluded)})" if excluded else ""
        if why:
            card = self._card(len(features), len(real), excluded, outcome)
            return [replace(not_run(self.name, self.family, "lower", why), card=card)]
        found = self.compare(features, real, outcome.bootstrap)
        low, high = found.interval(outcome.bootstrap.level)
        card = self._card(len(features), len(real), excluded, outcome)
        return [Score(self.name, self.family, found.value, low, high, card, None, "lower")]

    def _card(self, pictures: int, real: int, excluded: dict[str, int], outcome: Outcome) -> ScoreCard:
        source = "the cases' own true pictures" if self.own_reference else "a folder"
        bootstrap = outcome.bootstrap
        return ScoreCard(
            feature_model=self.tower.spec.architecture,
            weights_sha256=self.tower.sha256,
            resize_filter=self.tower.whole_filter,
            crop_rule="whole pictures",
            pictures=pictures,
            excluded=excluded,
            reference_sha256=outcome.cases_sha256 if self.own_reference else outcome.reference_sha256,
            interval=f"{bootstrap.level:.0%} normal, standard error of {bootstrap.set_resamples} "
            "resamples of the edits",
            notes=f"{self.notes}{'; ' if self.notes else ''}{real} real pictures from {source}",
        )


def edit_features(tower: Tower, batch: Batch) -> np.ndarray:
    """Return the features of a batch's whole edits, made once however many scores ask."""
    return batch.shared(tower.key, "edits", lambda: tower.whole(batch.edits))


class PictureFolder:
    """The pictures right in a folder, in the order of their names.

    Args:
        folder: holds PNG, JPEG or WebP files.

    Raises:
        UserError: no such folder, or no picture in it.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"the reference '{folder}' is no folder of pictures")
        self.paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise UserError(f"the reference folder '{folder}' holds no picture")
        self.digest = hashlib.sha256()

    def batches(self, size: int) -> Iterator[Batch]:
        """Read all pictures, batch by batch, and hash names and bytes on the way.

        Raises:
            UserError: a picture cannot be read.
        """
        for start in range(0, len(self.paths), size):
            pictures = []
            for path in self.paths[start : start + size]:
                pictures.append(read_picture(path))
                self.digest.update(path.name.encode() + b"\0" + path.read_bytes())
            yield Batch(list(range(start, start + len(pictures))), [], pictures)


def read_picture(path: Path) -> np.ndarray:
    """Read a real picture as uint8 RGB ``h w 3``.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the reference picture '{path}' cannot be read: {error}") from error
