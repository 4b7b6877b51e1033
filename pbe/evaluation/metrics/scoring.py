"""Scores of finished edits, chosen by name, in one pass that holds one batch of images at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pbe.errors import UserError
from pbe.evaluation.metrics import copy_paste, pixels
from pbe.evaluation.metrics.base import Batch, Case, Measure, Metric, NotRunError, Outcome, Score, reasons
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.copy_paste import LAYOUT_NAMES, layout_copy_measure, layout_true_measure
from pbe.evaluation.metrics.feature_scores import (
    FIRST_OF,
    FIRST_OF_SCORES,
    FirstOfMeasure,
    QualityMeasure,
    load_mixture,
    paper_region_measure,
    region_measure,
)
from pbe.evaluation.metrics.pixels import LpipsMeasure
from pbe.evaluation.metrics.sets import Compare, ImageFolder, SetMeasure, frechet, kernel
from pbe.evaluation.metrics.towers import OTHERS_ALLOWED, TOWERS, Tower, load_tower

Progress = Callable[[int, int], None]
ROLES = (*TOWERS, "lpips")


@dataclass(frozen=True)
class ScoreSettings:
    """What is scored, and with what.

    Attributes:
        metrics: names of :data:`METRICS`, each once; empty means all of them.
        batch_size: cases at a time; changes no score but by rounding.
        bootstrap: how intervals are made.
        weights: of the towers, by role (:data:`~pbe.evaluation.metrics.towers.TOWERS`, and ``lpips``): a
            file, for ``clip`` also a tag of open_clip, which may download.
        architectures: other towers than the roles' own; see :class:`pbe.evaluation.metrics.towers.TowerSpec`.
        mixture: file of the Gaussian mixture of QS.
        drop_remainder: QS leaves out the cases that fill no batch of fifty, as the original does.
        device: where the towers run.
    """

    metrics: tuple[str, ...] = ()
    batch_size: int = 32
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    weights: Mapping[str, str] = field(default_factory=dict)
    architectures: Mapping[str, str] = field(default_factory=dict)
    mixture: Path | None = None
    drop_remainder: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what cannot be used before any time is spent on it."""
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise UserError(f"there is no metric '{unknown[0]}'; there are: {', '.join(METRICS)}")
        if len(set(self.metrics)) != len(self.metrics):
            raise UserError("name every metric only once")
        strange = [role for role in (*self.weights, *self.architectures) if role not in ROLES]
        if strange:
            raise UserError(f"there is no tower '{strange[0]}'; there are: {', '.join(ROLES)}")
        fixed = [role for role in self.architectures if role not in OTHERS_ALLOWED]
        if fixed:
            raise UserError(f"the tower '{fixed[0]}' has one architecture; clip and dino may have others")
        if self.batch_size < 1:
            raise UserError(f"the batch size is {self.batch_size}; it must be at least 1")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The metrics that are made, in order."""
        return self.metrics or tuple(METRICS)


class Tools:
    """What measures are made with: the settings, and towers that are loaded once.

    With ``own_reference`` sets are compared with the true images of the cases.
    """

    def __init__(self, settings: ScoreSettings, own_reference: bool) -> None:
        self.settings, self.own_reference, self.device = settings, own_reference, settings.device
        self._towers: dict[str, Tower] = {}

    def tower(self, role: str) -> Tower:
        """Return a tower; raise NotRunError where its weights are not given."""
        if role not in self._towers:
            other = self.settings.architectures.get(role)
            self._towers[role] = load_tower(role, other, self.settings.weights.get(role), self.device)
        return self._towers[role]

    def distance(self, compare: Compare, role: str, notes: str = "") -> Measure:
        """Make a distance of sets on a tower's features."""
        return SetMeasure(self.tower(role), compare, self.own_reference, notes)

    def quality(self) -> Measure:
        """Make QS; raise NotRunError where no mixture is given."""
        tower = self.tower("clip")
        if self.settings.mixture is None:
            raise NotRunError("needs a mixture of Gaussians; pbe fit fits one")
        return QualityMeasure(tower, self.settings.mixture, self.settings.drop_remainder)


KID = "unbiased, cubic kernel, over all pairs rather than subsets"
TOY_FD = "Frechet distance on EfficientNet-Lite2 features; no FID"
CLIP_FID = "the original's FID: CLIP features without normalisation"
ROWS = (
    Metric("clip-fid", "paper", "lower", lambda tools: tools.distance(frechet, "clip", CLIP_FID)),
    Metric("qs", "paper", "higher", lambda tools: tools.quality()),
    Metric("region-clip", "paper", "higher", lambda tools: paper_region_measure(tools.tower("clip"))),
    Metric(
        "region-clip-corrected", "paper", "higher", lambda tools: region_measure(tools.tower("clip"), 100.0)
    ),
    Metric("fid", "clean", "lower", lambda tools: tools.distance(frechet, "inception")),
    Metric("kid", "clean", "lower", lambda tools: tools.distance(kernel, "inception", KID)),
    Metric("clip-similarity", "clean", "higher", lambda tools: region_measure(tools.tower("clip"))),
    Metric("dino-similarity", "clean", "higher", lambda tools: region_measure(tools.tower("dino"))),
    Metric(
        "lpips-outside",
        "clean",
        "lower",
        lambda tools: LpipsMeasure(tools.settings.weights.get("lpips"), tools.device),
    ),
    Metric("psnr-outside", "clean", "higher", lambda tools: pixels.psnr_measure()),
    Metric("ssim-outside", "clean", "higher", lambda tools: pixels.ssim_measure()),
    Metric("seam", "clean", "lower", lambda tools: pixels.seam_measure()),
    Metric("copy-paste", "clean", "lower", lambda tools: copy_paste.copy_paste_measure(), copy_paste.NAMES),
    Metric("layout-copy", "clean", "lower", lambda tools: layout_copy_measure(), LAYOUT_NAMES),
    Metric("layout-true", "clean", "higher", lambda tools: layout_true_measure()),
    Metric("colour-inside", "clean", "lower", lambda tools: pixels.colour_measure("inside")),
    Metric("colour-outside", "clean", "lower", lambda tools: pixels.colour_measure("outside")),
    Metric("toy-fd", "toy", "lower", lambda tools: tools.distance(frechet, "lite2", TOY_FD)),
    Metric("toy-similarity", "toy", "higher", lambda tools: region_measure(tools.tower("lite2"))),
    Metric(FIRST_OF, "toy", "higher", lambda tools: FirstOfMeasure(tools.tower("lite2")), FIRST_OF_SCORES),
)
METRICS: dict[str, Metric] = {row.name: row for row in ROWS}


def score(
    cases: Sequence[Case],
    edits: Sequence[np.ndarray | None],
    settings: ScoreSettings,
    reference: Path | None = None,
    progress: Progress | None = None,
    why_absent: Callable[[int], str] = lambda position: "missing",
) -> list[Score]:
    """Score edits of a benchmark.

    Args:
        cases: the benchmark; each is read once, when its turn comes.
        edits: one for each case, in the same order, uint8 ``h w 3`` of the size of its case's image; read
            likewise. None where an edit is missing: the case is left out, and the cards say so.
        settings: which scores, with what.
        reference: folder of real images that Frechet and kernel distances compare with; None takes the
            true images of the cases.
        progress: called with (cases scored, cases in all) after each batch.
        why_absent: asked for the reason where an edit at a position is None.

    Returns:
        The scores in the order of the settings; those that lack something (weights) with ``run`` False.
    """
    if len(cases) != len(edits):
        raise UserError(f"there are {len(edits)} edits for {len(cases)} cases; there must be one for each")
    tools = Tools(settings, own_reference=reference is None)
    measures, absent = _measures(tools)
    reference_sha256 = _read_reference(reference, measures, settings.batch_size)
    excluded: dict[str, int] = {}
    digest = hashlib.sha256()
    for batch in _batches(cases, edits, settings.batch_size, excluded, progress, why_absent):
        for case in batch.cases:
            digest.update(_case_digest(case))
        for measure in measures.values():
            measure.update(batch)
    left_out = sum(excluded.values())
    if left_out == len(cases):
        raise UserError(f"no edit can be scored: {reasons(excluded) or 'the benchmark is empty'}")
    outcome = Outcome(len(cases), excluded, digest.hexdigest(), settings.bootstrap, reference_sha256)
    made = {name: measure.finish(METRICS[name], outcome) for name, measure in measures.items()}
    return [one for name in settings.chosen for one in (made | absent)[name]]


def check_tools(settings: ScoreSettings, reference: Path | None = None) -> list[str]:
    """Make all that scoring needs, towers included, and let go of it again; nothing is scored.

    Returns:
        Names of the scores that will have a number for each case.
    """
    if reference is not None:
        ImageFolder(reference)
    if settings.mixture is not None:
        load_mixture(settings.mixture)
    made, _ = _measures(Tools(replace(settings, device="cpu"), own_reference=reference is None))
    by_case = [name for name, measure in made.items() if not isinstance(measure, SetMeasure)]
    return [one for name in by_case for one in METRICS[name].scores]


def _measures(tools: Tools) -> tuple[dict[str, Measure], dict[str, list[Score]]]:
    """Return the measures that can be made, and the scores of those that cannot."""
    measures: dict[str, Measure] = {}
    absent: dict[str, list[Score]] = {}
    for name in tools.settings.chosen:
        try:
            measures[name] = METRICS[name].make(tools)
        except NotRunError as error:
            absent[name] = METRICS[name].not_run(str(error))
    return measures, absent


def _read_reference(folder: Path | None, measures: dict[str, Measure], batch_size: int) -> str:
    """Show the real images to those measures that need them; return their hash."""
    wanting = [measure for measure in measures.values() if isinstance(measure, SetMeasure)]
    if folder is None or not wanting:
        return ""
    images = ImageFolder(folder)
    for batch in images.batches(batch_size):
        for measure in wanting:
            measure.update_reference(batch)
    return images.digest.hexdigest()


def _batches(
    cases: Sequence[Case],
    edits: Sequence[np.ndarray | None],
    size: int,
    excluded: dict[str, int],
    progress: Progress | None,
    why_absent: Callable[[int], str],
) -> Iterator[Batch]:
    """Read the pairs that can be scored, batch by batch; count the others in ``excluded``."""
    for start in range(0, len(cases), size):
        batch = Batch([], [], [])
        stop = min(start + size, len(cases))
        for position in range(start, stop):
            case, edit = cases[position], edits[position]
            fault = why_absent(position) if edit is None else find_fault(case, edit)
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


def _case_digest(case: Case) -> bytes:
    """Return the SHA-256 of what scores compare an edit with: name, true image, mask, exemplar, shapes."""
    arrays = (case.image, case.mask, case.exemplar)
    digest = hashlib.sha256(json.dumps([case.id, *(array.shape for array in arrays)]).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def find_fault(case: Case, edit: np.ndarray | None) -> str:
    """Return why an edit cannot be scored, in a few words; empty if it can."""
    if edit is None:
        return "missing"
    if edit.dtype != np.uint8 or edit.ndim != 3 or edit.shape[2] != 3:
        return "not an 8-bit RGB image"
    if edit.shape != case.image.shape:
        return "of another size than its case"
    if case.mask.shape != edit.shape[:2]:
        return "with a mask of another size"
    return "" if np.any(case.mask > 127) else "with an empty mask"
