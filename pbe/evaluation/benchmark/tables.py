"""Scores as tables, one for each family, and their identity cards, as texts for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pbe.evaluation.benchmark import published
from pbe.evaluation.metrics.results import FAMILIES, Family, Score, ScoreCard

CARD_NAMES = {
    "feature_model": "feature model",
    "weights_sha256": "SHA-256 of its weights",
    "resize_filter": "resizing",
    "crop_rule": "crop",
    "pictures": "pictures",
    "excluded": "left out",
    "reference_sha256": "SHA-256 of the real pictures",
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


def score_tables(runs: Sequence[ScoredEdits]) -> list[ScoreTable]:
    """Return a table for each family that has scores; the paper's family has the published numbers beside it.

    Args:
        runs: at least one, all with the same scores.
    """
    tables = []
    for family, meaning in FAMILIES.items():
        rows = [_row(runs, index) for index, one in enumerate(runs[0].scores) if one.family == family]
        if not rows:
            continue
        head = ["score", "better", "pictures", *(run.label for run in runs)]
        names = [one.name for one in runs[0].scores if one.family == family]
        note = _why_not(runs, family)
        if family == "paper":
            head.append(published.OURS)
            rows = [[*row, _number(name)] for row, name in zip(rows, names, strict=True)]
        tables.append(ScoreTable(f"{meaning[0].upper()}{meaning[1:]}", head, rows, note))
        if family == "paper":
            tables.append(published_table())
    return tables


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


def _number(score: str) -> str:
    number = published.paper_number(score)
    return "–" if number is None else str(number)


def _why_not(runs: Sequence[ScoredEdits], family: Family) -> str:
    absent: dict[str, list[str]] = {}
    for one in runs[0].scores:
        if one.family == family and not one.run:
            absent.setdefault(one.why_not, []).append(one.name)
    return "; ".join(f"{', '.join(names)} {why}" for why, names in absent.items())


def card_facts(card: ScoreCard) -> list[tuple[str, str]]:
    """Return what a card says, (what, text), without what it leaves empty."""
    facts = []
    for name, value in card.to_dict().items():
        if isinstance(value, dict):
            value = ", ".join(f"{count} {reason}" for reason, count in value.items()) or "nothing"
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
