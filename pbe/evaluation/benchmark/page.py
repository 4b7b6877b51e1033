"""The page of an evaluation: tables, the best, the worst and random edits, and identity cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pbe.data.randomness import permutation
from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.benchmark.edits import EditFolder
from pbe.evaluation.benchmark.tables import ScoredEdits, card_facts
from pbe.evaluation.metrics.base import Score
from pbe.html import Tile

TEMPLATE = Path(__file__).with_name("page.html.j2")
TILE = 256  # longest side of an image on the page
# Scores that tell good edits from bad ones come first where no other is asked for.
PREFERRED = ("region", "similarity", "copy-paste", "seam")


@dataclass(frozen=True)
class PageSettings:
    """What the page shows: so many of the best, worst and random edits each.

    Best and worst are chosen by the score ``rank_by``, empty: by one that tells edits apart; the random ones
    belong to ``seed``.
    """

    shown: int = 8
    rank_by: str = ""
    seed: int = 0


@dataclass(frozen=True)
class ShownEdits:
    """Edits of one set: (name, strips of tiles) for the best, the worst and random ones."""

    title: str
    note: str
    groups: list[tuple[str, list[list[Tile]]]]


def ranking_score(scores: Sequence[Score], name: str = "") -> Score | None:
    """Return the score that edits are ranked by, which must have numbers for single edits.

    Without a ``name`` it is the first that tells edits apart, region similarities before others, or None.
    """
    usable = [one for one in scores if one.per_case is not None and np.isfinite(one.per_case).any()]
    if name:
        for one in usable:
            if one.name == name:
                return one
        raise UserError(f"edits cannot be ranked by '{name}'; there are: {', '.join(s.name for s in usable)}")
    telling = [one for one in usable if _spread(one) > 0.0]
    preferred = (one for part in PREFERRED for one in telling if part in one.name)
    return next(preferred, telling[0] if telling else None)


def _spread(score: Score) -> float:
    assert score.per_case is not None
    return float(np.ptp(score.per_case[np.isfinite(score.per_case)]))


def picks(score: Score | None, available: Sequence[int], count: int, seed: int) -> dict[str, list[int]]:
    """Choose ``count`` of each kind of edits to show, among the positions that can be shown.

    Returns:
        Kind to positions: best first and worst first, where there is a score, and random ones in the
        benchmark's order.
    """
    chosen: dict[str, list[int]] = {}
    if score is not None and score.per_case is not None:
        values = score.per_case
        ranked = sorted((i for i in available if not np.isnan(values[i])), key=lambda i: (values[i], i))
        if score.better == "higher":
            ranked.reverse()
        chosen = {"Best": ranked[:count], "Worst": ranked[::-1][:count]}
    shuffled = permutation(len(available), seed, "shown-edits")[:count]
    return chosen | {"Random": sorted(available[int(i)] for i in shuffled)}


def show_edits(run: ScoredEdits, edits: EditFolder, settings: PageSettings) -> ShownEdits:
    """Return what the page shows of a set of edits, which are read here."""
    ranking = ranking_score(run.scores, settings.rank_by)
    left_out = edits.left_out
    available = [i for i, each in enumerate(edits.benchmark.ids) if each not in left_out]
    chosen = picks(ranking, available, settings.shown, settings.seed)
    groups = [(kind, [_strip(edits, i, ranking) for i in positions]) for kind, positions in chosen.items()]
    note = (
        "Each strip: the masked image, the exemplar, the edit, and the true object; "
        f"large ones are reduced to {TILE} pixels."
    )
    if ranking is not None:
        note += f" Best and worst are by {ranking.name} ({ranking.better} is better)."
    return ShownEdits(f"Edits: {run.label}", note, groups)


def _strip(edits: EditFolder, position: int, ranking: Score | None) -> list[Tile]:
    case, edit = edits.benchmark[position], edits[position]
    caption = case.id.lstrip("0") or "0"
    if ranking is not None and ranking.per_case is not None and np.isfinite(ranking.per_case[position]):
        caption += f": {ranking.per_case[position]:.3f}"
    shown = {"masked": case.masked, "exemplar": case.exemplar}
    shown |= {} if edit is None else {caption: edit}
    return [Tile(name, fit(image)) for name, image in (shown | {"true object": case.image}).items()]


def fit(image: np.ndarray, side: int = TILE) -> np.ndarray:
    """Return an image, uint8 ``h w 3``, reduced to at most ``side`` pixels on its longer side."""
    height, width = image.shape[:2]
    if max(height, width) <= side:
        return image
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def cards_of(runs: Sequence[ScoredEdits]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the identity cards of all scores that were run, (name, facts)."""
    several = len(runs) > 1
    return [
        (f"{one.name}, {run.label}" if several else one.name, card_facts(one.card))
        for run in runs
        for one in run.scores
        if one.run
    ]


def exclusions(edits: EditFolder) -> str:
    """Return one line on edits that could not be used and files that belong to no case; empty if none."""
    by_reason: dict[str, list[str]] = {}
    for each, reason in edits.left_out.items():
        by_reason.setdefault(reason, []).append(each)
    parts = [
        f"{len(each)} of {len(edits)} edits {'is' if len(each) == 1 else 'are'} {reason}, such as {each[0]}"
        for reason, each in by_reason.items()
    ]
    if edits.extra:
        parts.append(f"{len(edits.extra)} files belong to no case, such as {edits.extra[0]}")
    return f"'{edits.folder}': {'; '.join(parts)}" if parts else ""


def describe(benchmark: BenchmarkFolder) -> str:
    """Return a sentence on the benchmark."""
    height, width = benchmark.sizes[0]
    count = len(benchmark)
    cases = f"{count} cases" if count == len(benchmark.numbers) else f"The first {count} cases"
    return f"{cases} of '{benchmark.folder}' ({width} x {height} pixels), SHA-256 {benchmark.sha256[:16]}."
