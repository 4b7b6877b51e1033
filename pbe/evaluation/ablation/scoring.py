"""Scores of one row and seed as files: written by a stage, read for the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from PIL import Image

from pbe.editing.batch.runner import pick_device
from pbe.errors import UserError
from pbe.evaluation.ablation.auc import exemplar_auc
from pbe.evaluation.ablation.config import EvaluationConfig
from pbe.evaluation.ablation.pose import pose_scores
from pbe.evaluation.ablation.stages import fingerprint_of, write_json
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.quality import load_mixture
from pbe.evaluation.metrics.scoring import ScoreSettings, score
from pbe.evaluation.metrics.sets import ImageFolder
from pbe.evaluation.metrics.towers import TOWERS, file_sha256

SCORES = "scores.json"
GIVEN = ("tower_weights", "mixture", "reference")  # keys of what scores need from outside


@dataclass(frozen=True)
class Measured:
    """A score of one row and seed.

    Attributes:
        name: of the score.
        family: scores of two families never stand in one table.
        better: ``higher`` or ``lower``.
        value: of the whole set; NaN where it was not run.
        low: lower end of its own interval.
        high: upper end.
        per_case: ``(n,)`` float64, NaN for cases left out; None for scores of sets.
        why_not: why it was not run.
        card: what it rests on.
    """

    name: str
    family: str
    better: str
    value: float
    low: float
    high: float
    per_case: np.ndarray | None
    why_not: str
    card: dict[str, Any]


class EditFolder(Sequence[np.ndarray]):
    """The edits of a benchmark in the order of its cases, read when asked for.

    Args:
        folder: of ``<id>.png``.
        ids: of the cases.
    """

    def __init__(self, folder: Path, ids: Sequence[str]) -> None:
        self.folder, self.ids = folder, list(ids)

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        """Return the edit of a case, uint8 ``h w 3``."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with Image.open(self.folder / f"{self.ids[index]}.png") as picture:
            return np.array(picture.convert("RGB"))


def identities(options: EvaluationConfig) -> dict[str, Any]:
    """Return what the files are that scores need: hashes, or the tag of a tower; nothing where none is given.

    Raises:
        UserError: a tower that there is not, or a file or folder that is missing or cannot be used.
    """
    ScoreSettings(weights=options.tower_weights)
    found: dict[str, Any] = {}
    if options.tower_weights:
        found["tower_weights"] = {role: _weights(role, text) for role, text in options.tower_weights.items()}
    if options.mixture:
        load_mixture(Path(options.mixture))
        found["mixture"] = file_sha256(Path(options.mixture))
    if options.reference:
        paths = ImageFolder(Path(options.reference)).paths
        found["reference"] = fingerprint_of([(path.name, file_sha256(path)) for path in paths])
    return found


def _weights(role: str, text: str) -> str:
    if Path(text).is_file():
        return file_sha256(Path(text))
    if role == "clip" and text in open_clip.list_pretrained_tags_by_model(TOWERS[role].architecture):
        return text
    raise UserError(f"'evaluation.tower_weights' gives '{text}' for {role}; there is no such file")


def score_folder(job: dict[str, Any], folder: Path) -> None:
    """Score the edits that a job names, and write ``scores.json``."""
    cases = BenchmarkFolder(job["benchmark"])
    edits = EditFolder(Path(job["edits"]), cases.ids)
    bootstrap = Bootstrap(level=job["level"], resamples=job["resamples"])
    weights, mixture, reference = (job.get(name) for name in GIVEN)
    settings = ScoreSettings(
        metrics=tuple(job["metrics"]),
        bootstrap=bootstrap,
        weights=weights or {},
        mixture=Path(mixture) if mixture else None,
        device=str(pick_device("auto")) if weights else "cpu",
    )
    scores = score(cases, edits, settings, Path(reference) if reference else None)
    if job["exemplar_auc"]:
        scores.append(exemplar_auc(cases, edits, bootstrap))
    if job["own_edits"]:
        scores += pose_scores(cases, edits, EditFolder(Path(job["own_edits"]), cases.ids), bootstrap)
    write_json(folder / SCORES, [one.to_dict() for one in scores])


def read_scores(folder: Path) -> dict[str, Measured]:
    """Read what :func:`score_folder` wrote, by name of the score.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return {one["name"]: _measured(one) for one in json.loads((folder / SCORES).read_text())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{folder / SCORES}' is missing or damaged; delete the folder '{folder}', and the same command "
            "scores once more"
        ) from error


def _measured(content: dict[str, Any]) -> Measured:
    per_case = content["per_case"]
    return Measured(
        name=content["name"],
        family=content["family"],
        better=content["better"],
        value=_number(content["value"]),
        low=_number(content["low"]),
        high=_number(content["high"]),
        per_case=None if per_case is None else np.array([_number(one) for one in per_case], np.float64),
        why_not=content["why_not"],
        card=content["card"],
    )


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
