"""Scores of finished edits, chosen by name, in one pass that holds one batch of pictures at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pbe.errors import UserError
from pbe.evaluation.colour import colour_measure
from pbe.evaluation.measures import Batch, Case, Measure, NotRunError, Outcome
from pbe.evaluation.outside import psnr_measure, ssim_measure
from pbe.evaluation.results import Better, Bootstrap, Family, Score, not_run
from pbe.evaluation.seam import seam_measure

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ScoreSettings:
    """What is scored, and with what.

    Attributes:
        metrics: names of :data:`METRICS`, each once; empty means all of them.
        batch_size: cases at a time; changes no score but by rounding.
        bootstrap: how intervals are made.

    Raises:
        UserError: an unknown or repeated metric, or an empty batch.
    """

    metrics: tuple[str, ...] = ()
    batch_size: int = 32
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __post_init__(self) -> None:
        """Refuse what cannot be used before any time is spent on it."""
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise UserError(f"there is no metric '{unknown[0]}'; there are: {', '.join(METRICS)}")
        if len(set(self.metrics)) != len(self.metrics):
            raise UserError("every metric is named once")
        if self.batch_size < 1:
            raise UserError(f"the batch size is {self.batch_size}; it must be at least 1")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The metrics that are made, in order."""
        return self.metrics or tuple(METRICS)


@dataclass(frozen=True)
class Metric:
    """A row of the registry.

    Attributes:
        family: of its scores.
        better: which direction.
        make: the measure; raises NotRunError where something it needs is not there.
        scores: names of its scores where they are not just the metric's own.
    """

    family: Family
    better: Better
    make: Callable[[ScoreSettings], Measure]
    scores: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    "psnr-outside": Metric("clean", "higher", lambda settings: psnr_measure()),
    "ssim-outside": Metric("clean", "higher", lambda settings: ssim_measure()),
    "seam": Metric("clean", "lower", lambda settings: seam_measure()),
    "colour-inside": Metric("clean", "lower", lambda settings: colour_measure("inside")),
    "colour-outside": Metric("clean", "lower", lambda settings: colour_measure("outside")),
}


def score(
    cases: Sequence[Case],
    edits: Sequence[np.ndarray | None],
    settings: ScoreSettings,
    reference: Path | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Score edits of a benchmark.

    Args:
        cases: the benchmark; each is read once, when its turn comes.
        edits: one for each case, in the same order, uint8 ``h w 3`` of the size of its case's image; read
            likewise. None where an edit is missing: the case is left out, and the cards say so.
        settings: which scores, with what.
        reference: folder of real pictures that Frechet and kernel distances compare with; None takes the
            true pictures of the cases.
        progress: called with (cases scored, cases in all) after each batch.

    Returns:
        The scores in the order of the settings; those that lack something (weights) with ``run`` False.

    Raises:
        UserError: not as many edits as cases, or not one edit that can be scored.
    """
    if len(cases) != len(edits):
        raise UserError(f"there are {len(edits)} edits for {len(cases)} cases; there must be one for each")
    measures, absent = _measures(settings)
    excluded: dict[str, int] = {}
    digest = hashlib.sha256()
    for batch in _batches(cases, edits, settings.batch_size, excluded, progress):
        for case in batch.cases:
            digest.update(np.ascontiguousarray(case.image).tobytes())
        for measure in measures.values():
            measure.update(batch)
    left_out = sum(excluded.values())
    if left_out == len(cases):
        reasons = ", ".join(f"{count} {reason}" for reason, count in excluded.items())
        raise UserError(f"no edit can be scored: {reasons or 'the benchmark is empty'}")
    outcome = Outcome(len(cases), excluded, digest.hexdigest(), settings.bootstrap)
    made = {name: measure.finish(outcome) for name, measure in measures.items()}
    return [one for name in settings.chosen for one in made.get(name, absent.get(name, []))]


def _measures(settings: ScoreSettings) -> tuple[dict[str, Measure], dict[str, list[Score]]]:
    """Return the measures that can be made, and the scores of those that cannot."""
    measures: dict[str, Measure] = {}
    absent: dict[str, list[Score]] = {}
    for name in settings.chosen:
        row = METRICS[name]
        try:
            measures[name] = row.make(settings)
        except NotRunError as error:
            names = row.scores or (name,)
            absent[name] = [not_run(one, row.family, row.better, str(error)) for one in names]
    return measures, absent


def _batches(
    cases: Sequence[Case],
    edits: Sequence[np.ndarray | None],
    size: int,
    excluded: dict[str, int],
    progress: Progress | None,
) -> Iterator[Batch]:
    """Read the pairs that can be scored, batch by batch; count the others in ``excluded``."""
    for start in range(0, len(cases), size):
        batch = Batch([], [], [])
        stop = min(start + size, len(cases))
        for position in range(start, stop):
            case, edit = cases[position], edits[position]
            fault = find_fault(case, edit)
            if fault or edit is None:
                excluded[fault] = excluded.get(fault, 0) + 1
                continue
            batch.positions.append(position)
            batch.cases.append(case)
            batch.edits.append(edit)
        if batch.cases:
            yield batch
        if progress is not None:
            progress(stop, len(cases))


def find_fault(case: Case, edit: np.ndarray | None) -> str:
    """Return why an edit cannot be scored, in a few words; empty if it can."""
    if edit is None:
        return "missing"
    if edit.dtype != np.uint8 or edit.ndim != 3 or edit.shape[2] != 3:
        return "not an 8-bit RGB picture"
    if edit.shape != case.image.shape:
        return "of another size than its case"
    if case.mask.shape != edit.shape[:2]:
        return "with a mask of another size"
    return "" if np.any(case.mask > 127) else "without a hole in the mask"
