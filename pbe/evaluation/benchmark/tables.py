"""Scores as tables, one for each family, and their identity cards, as texts for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pbe.evaluation.benchmark import published
from pbe.evaluation.metrics.results import (
    FAMILIES,
    Bootstrap,
    Family,
    Score,
    ScoreCard,
    reasons,
    short_number,
)
from pbe.evaluation.metrics.towers import TOWERS

PAPER_TOWER = TOWERS["clip"].architecture
PAIRED_NOTE = (
    "Means of the differences of single cases, over those that both sets have, with the interval of a paired "
    "bootstrap over pictures. Infinite numbers, such as the PSNR of pixels that were kept, are left out."
)
CARD_NAMES = {
    "feature_model": "feature model",
    "weights_sha256": "SHA-256 of its weights",
    "resize_filter": "resizing",
    "crop_rule": "crop",
    "pictures": "pictures",
    "excluded": "left out",
    "reference_sha256": "SHA-256 of the reference",
    "interval": "interval",
    "notes": "notes",
}


@dataclass(frozen=True)
class ScoreTable:
    """A table of texts; the first column names the row."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class ScoredEdits:
    """Scores of one set of edits.

    Attributes:
        label: of the set, such as ``guidance 5``.
        scores: in the same order for every set of a run.
    """

    label: str
    scores: Sequence[Score]


def score_tables(runs: Sequence[ScoredEdits], *, coco_ee: bool) -> list[ScoreTable]:
    """Return a table for each family that has scores; the paper's family has the published numbers beside it.

    Args:
        runs: at least one, all with the same scores.
        coco_ee: the scores are of all of COCOEE; published numbers are no comparison to any others, and left
            out.
    """
    tables = []
    for family, meaning in FAMILIES.items():
        rows = [_row(runs, index) for index, one in enumerate(runs[0].scores) if one.family == family]
        if not rows:
            continue
        head = ["score", "better", "pictures", *(run.label for run in runs)]
        note = _why_not(runs, family)
        if family == "paper" and coco_ee:
            numbers = [
                published_number([run.scores[index] for run in runs])
                for index, one in enumerate(runs[0].scores)
                if one.family == family
            ]
            head.append(published.OURS)
            rows = [[*row, "–" if one is None else str(one)] for row, one in zip(rows, numbers, strict=True)]
            note = "; ".join(part for part in (note, _other_towers(runs)) if part)
        tables.append(ScoreTable(f"{meaning[0].upper()}{meaning[1:]}", head, rows, note))
        if family == "paper" and coco_ee:
            tables.append(published_table())
    return tables


def paired_tables(runs: Sequence[ScoredEdits], bootstrap: Bootstrap) -> list[ScoreTable]:
    """Return a table for each family of what every set has more than the first, case by case.

    Args:
        runs: all with the same scores; one alone has no differences.
        bootstrap: how intervals are made.
    """
    tables = []
    for family, meaning in FAMILIES.items() if len(runs) > 1 else ():
        rows = []
        for index, one in enumerate(runs[0].scores):
            sets = [run.scores[index].per_case for run in runs]
            if one.family == family and all(values is not None for values in sets):
                pairs = [_differences(values, sets[0]) for values in sets[1:]]
                counts = [str(len(each)) for each in pairs]
                number = counts[0] if len(set(counts)) == 1 else " / ".join(counts)
                cells = [_difference_text(each, bootstrap) for each in pairs]
                rows.append([one.name, one.better, number, *cells])
        if rows:
            head = ["score", "better", "pictures", *(f"{run.label} − {runs[0].label}" for run in runs[1:])]
            tables.append(ScoreTable(f"Paired differences: {meaning}", head, rows, PAIRED_NOTE))
    return tables


def _differences(values: np.ndarray | None, first: np.ndarray | None) -> np.ndarray:
    """Return the finite differences of two sets' numbers by case."""
    assert values is not None
    assert first is not None
    with np.errstate(invalid="ignore"):  # two perfect cases: infinite less infinite
        differences = values - first
    return differences[np.isfinite(differences)]


def _difference_text(differences: np.ndarray, bootstrap: Bootstrap) -> str:
    if len(differences) < 2:
        return "–"
    found = bootstrap.of_mean(differences)
    value, low, high = (
        f"{'+' if number > 0 else ''}{short_number(number)}"
        for number in (found.value, found.low, found.high)
    )
    return f"{value} ({low} to {high})"


def published_table() -> ScoreTable:
    """Return the paper's comparison, every number marked as published or unverified."""
    rows = [
        [method, *(str(row[column]) for column in published.COLUMNS)]
        for method, row in published.TABLE.items()
    ]
    return ScoreTable("What the paper reports", ["method", *published.COLUMNS], rows, published.NOTE)


def _row(runs: Sequence[ScoredEdits], index: int) -> list[str]:
    first = runs[0].scores[index]
    texts = (run.scores[index].text() for run in runs)
    return [first.name, first.better, _pictures([run.scores[index] for run in runs]), *texts]


def _pictures(scores: Sequence[Score]) -> str:
    """Return how many pictures a score is made of: one number, or one for each set where they differ."""
    counts = [str(one.card.pictures) if one.run else "–" for one in scores]
    return counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def published_number(scores: Sequence[Score]) -> published.Published | None:
    """Return the paper's number for one score of several sets; None where it is no comparison.

    That is where the paper has none, or another tower than its own made the score.
    """
    own = all(one.family == "paper" and not _other_tower(one) for one in scores)
    return published.paper_number(scores[0].name) if own else None


def _other_tower(one: Score) -> str:
    tower = one.card.feature_model
    return tower if one.run and tower not in ("", PAPER_TOWER) else ""


def _other_towers(runs: Sequence[ScoredEdits]) -> str:
    """Say which scores of the paper's family rest on another tower than the paper's."""
    names: dict[str, list[str]] = {}
    for one in runs[0].scores:
        if one.family == "paper" and (tower := _other_tower(one)):
            names.setdefault(tower, []).append(one.name)
    parts = [f"{', '.join(each)} by {tower}" for tower, each in names.items()]
    return f"{'; '.join(parts)}: not the paper's {PAPER_TOWER}, so no published number" if parts else ""


def _why_not(runs: Sequence[ScoredEdits], family: Family) -> str:
    """Say why scores of a family were not run; where that is not so of every set alike, of which set."""
    absent: dict[str, list[str]] = {}
    for index, one in enumerate(runs[0].scores):
        whys = [run.scores[index].why_not for run in runs] if one.family == family else []
        if len(set(whys)) == 1 and whys[0]:
            absent.setdefault(whys[0], []).append(one.name)
            continue
        for run, why in zip(runs, whys, strict=False):
            if why:
                absent.setdefault(why, []).append(f"{one.name} of {run.label}")
    return "; ".join(f"{', '.join(names)} {why}" for why, names in absent.items())


def card_facts(card: ScoreCard) -> list[tuple[str, str]]:
    """Return what a card says, (what, text), without what it leaves empty."""
    facts = []
    for name, value in card.to_dict().items():
        if isinstance(value, dict):
            value = reasons(value) or "nothing"
        if value != "":
            facts.append((CARD_NAMES.get(name, name), str(value)))
    return facts


def markdown(title: str, tables: Sequence[ScoreTable], runs: Sequence[ScoredEdits] = ()) -> str:
    """Return tables and the identity cards of ``runs`` (there may be none) as Markdown."""
    parts = [f"# {title}"]
    for table in tables:
        lines = [table.head, ["---"] * len(table.head), *table.rows]
        body = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
        parts += [f"## {table.title}", body, *([table.note] if table.note else [])]
    if runs:
        parts.append("## Identity cards")
    for run in runs:
        for one in run.scores:
            if one.run:
                facts = "; ".join(f"{what}: {value}" for what, value in card_facts(one.card))
                parts.append(f"- **{one.name}**, {run.label}. {facts}")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
