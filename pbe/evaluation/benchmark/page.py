"""The page of an evaluation: tables, the best, the worst and random edits, and identity cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pbe.data.randomness import permutation
from pbe.editing.images import grey_out
from pbe.errors import UserError
from pbe.evaluation.benchmark.cases import BenchmarkFolder
from pbe.evaluation.benchmark.edit_files import EditFolder
from pbe.evaluation.benchmark.tables import ScoredEdits, ScoreTable, card_facts
from pbe.evaluation.metrics.results import Score
from pbe.evaluation.report.html import Tile, page_environment

TEMPLATE = "benchmark/page.html.j2"
TILE = 256  # longest side of a picture on the page
# Scores that tell good edits from bad ones come first where no other is asked for.
PREFERRED = ("region", "similarity", "copy-paste", "seam")


@dataclass(frozen=True)
class Section:
    """Edits of one set: (name, strips of tiles) for the best, the worst and random ones."""

    title: str
    note: str
    groups: list[tuple[str, list[list[Tile]]]]


@dataclass
class EvaluationPage:
    """Everything the page shows; all texts are escaped.

    Attributes:
        title: of the page.
        lead: what was evaluated on what.
        tables: of scores.
        sections: edits of each set.
        cards: (score, facts).
        facts: (what, value), how the edits were made.
        warnings: what a reader must not miss, such as exclusions.
    """

    title: str
    lead: str
    tables: list[ScoreTable]
    sections: list[Section] = field(default_factory=list)
    cards: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def render_page(page: EvaluationPage) -> str:
    """Return the page's HTML, which holds its pictures and needs no network."""
    return page_environment().get_template(TEMPLATE).render(page=page)


def ranking_score(scores: Sequence[Score], name: str = "") -> Score | None:
    """Return the score that edits are ranked by.

    Args:
        scores: of the edits.
        name: of one with a number for each case; empty takes the first that tells edits apart, region
            similarities before others.

    Returns:
        None where there is none and none was asked for.

    Raises:
        UserError: the score asked for is not there or has no numbers for single edits.
    """
    usable = [one for one in scores if one.per_case is not None and np.isfinite(one.per_case).any()]
    if name:
        for one in usable:
            if one.name == name:
                return one
        raise UserError(f"edits cannot be ranked by '{name}'; there are: {', '.join(s.name for s in usable)}")
    telling = [one for one in usable if _spread(one) > 0.0]
    for part in PREFERRED:
        for one in telling:
            if part in one.name:
                return one
    return telling[0] if telling else None


def _spread(score: Score) -> float:
    assert score.per_case is not None
    return float(np.ptp(score.per_case[np.isfinite(score.per_case)]))


def picks(score: Score | None, available: Sequence[int], count: int, seed: int) -> dict[str, list[int]]:
    """Choose which edits to show.

    Args:
        score: to rank by, or None: then there are random ones only.
        available: positions of the cases whose edits can be shown.
        count: how many of each kind.
        seed: of the random ones.

    Returns:
        Kind to positions: best first, worst first, random ones in the benchmark's order.
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


def show_edits(
    label: str,
    edits: EditFolder,
    scores: Sequence[Score],
    *,
    rank_by: str = "",
    count: int = 8,
    seed: int = 0,
) -> Section:
    """Return the section of the page that shows a set of edits.

    Args:
        label: of the set.
        edits: to show, which are read here.
        scores: of these edits.
        rank_by: see :func:`ranking_score`.
        count: edits of each kind.
        seed: of the random ones.
    """
    ranking = ranking_score(scores, rank_by)
    left_out = edits.left_out
    available = [i for i, each in enumerate(edits.benchmark.ids) if each not in left_out]
    chosen = picks(ranking, available, count, seed)
    groups = [(kind, [_strip(edits, i, ranking) for i in positions]) for kind, positions in chosen.items()]
    note = (
        "Each strip: the picture with its hole, the exemplar, the edit, and the true object; "
        f"large ones are reduced to {TILE} pixels."
    )
    if ranking is not None:
        note += f" Best and worst are by {ranking.name} ({ranking.better} is better)."
    return Section(f"Edits: {label}", note, groups)


def _strip(edits: EditFolder, position: int, ranking: Score | None) -> list[Tile]:
    case, edit = edits.benchmark[position], edits[position]
    caption = case.id.lstrip("0") or "0"
    if ranking is not None and ranking.per_case is not None and np.isfinite(ranking.per_case[position]):
        caption += f": {ranking.per_case[position]:.3f}"
    shown = {"hole": grey_out(case.image, case.mask > 127), "exemplar": case.exemplar}
    shown |= {} if edit is None else {caption: edit}
    return [Tile(name, fit(picture)) for name, picture in (shown | {"true object": case.image}).items()]


def fit(picture: np.ndarray, side: int = TILE) -> np.ndarray:
    """Return a picture, uint8 ``h w 3``, reduced to at most ``side`` pixels on its longer side."""
    height, width = picture.shape[:2]
    if max(height, width) <= side:
        return picture
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


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
