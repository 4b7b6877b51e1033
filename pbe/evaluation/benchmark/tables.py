"""Scores as tables, one for each family, with the numbers that the paper reports, and their identity cards.

The paper's numbers belong to all 3500 cases of COCOEE, to CLIP ViT-B/32 and to COCO test2017 as the real
images; none was measured here, and each says how sure it is. On another benchmark they say nothing, and are
not shown.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pbe.evaluation.metrics.base import FAMILIES, Family, Score, ScoreCard, reasons, short_number
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.towers import TOWERS
from pbe.evaluation.report.tables import Table, markdown

PAPER_TOWER = TOWERS["clip"].architecture
PAIRED_NOTE = (
    "Means of the differences of single cases, over those that both sets have, with the interval of a paired "
    "bootstrap over images. Infinite numbers, such as the PSNR of pixels that were kept, are left out."
)
CARD_NAMES = {
    "feature_model": "feature model",
    "weights_sha256": "SHA-256 of its weights",
    "resize_filter": "resizing",
    "crop_rule": "crop",
    "excluded": "left out",
    "reference_sha256": "SHA-256 of the reference",
}

# The released list of COCOEE's ids: how many there are, and how many lie above a number. Many are no ids of
# COCO, whose largest is 581929, so no benchmark that is built from COCO has them.
COCO_EE_CASES, COCO_EE_ABOVE = 3500, {581_929: 1638, 999_999: 1302}
OURS = "Paint by Example (paper)"
# The column of the paper's table that a score of the paper's family belongs to.
COLUMNS = {"clip-fid": "FID", "qs": "QS", "region-clip": "CLIP score"}
# The paper's comparison on COCOEE: lower is better for FID, higher for the others.
PUBLISHED: dict[str, tuple[str, str, str]] = {
    "Blended Diffusion (image)": ("4.60 (unverified)", "67.14 (unverified)", "80.65 (unverified)"),
    "Blended Diffusion (text)": ("7.52 (unverified)", "55.89 (unverified)", "72.62 (unverified)"),
    "DCCF": ("3.78 (unverified)", "71.49 (unverified)", "82.18 (unverified)"),
    "Stable Diffusion": ("3.66 (unverified)", "73.20 (unverified)", "75.33 (unverified)"),
    OURS: ("3.18 (published)", "77.80 (published)", "84.97 (unverified)"),
}
PUBLISHED_NOTE = (
    "Published numbers belong to the 3500 cases of COCOEE, with COCO test2017 as the real images. FID is a "
    "Fréchet distance of CLIP ViT-B/32 features, not of Inception's. "
    "Published: seen in the leaderboard of bcmi/Awesome-Generative-Image-Composition. "
    "Unverified: recalled from the paper, which was not at hand."
)


@dataclass(frozen=True)
class ScoredEdits:
    """Scores of one set of edits, in the same order for every set of a run."""

    label: str
    scores: Sequence[Score]


def is_coco_ee(numbers: Collection[int]) -> bool:
    """Tell by the numbers of its cases whether a benchmark is all of the released COCOEE."""
    above = {bound: sum(number > bound for number in numbers) for bound in COCO_EE_ABOVE}
    return len(numbers) == COCO_EE_CASES and above == COCO_EE_ABOVE


def published_number(scores: Sequence[Score]) -> str | None:
    """Return the paper's number for one score of several sets; None where it is no comparison.

    That is where the paper has none, or another tower than its own made the score.
    """
    name = scores[0].name
    if name not in COLUMNS or any(one.family != "paper" or _other_tower(one) for one in scores):
        return None
    return PUBLISHED[OURS][list(COLUMNS).index(name)]


def _other_tower(one: Score) -> str:
    tower = one.card.feature_model
    return tower if one.run and tower not in ("", PAPER_TOWER) else ""


def score_tables(runs: Sequence[ScoredEdits], *, coco_ee: bool) -> list[Table]:
    """Return a table for each family that has scores, of one or more sets.

    Where they are of all of COCOEE, the paper's family has the published numbers beside it, which are no
    comparison to any others.
    """
    tables = []
    for family, meaning in FAMILIES.items():
        every = _by_score(runs, family)
        if not every:
            continue
        head = ["score", "better", "images", *(run.label for run in runs)]
        rows = [
            [sets[0].name, sets[0].better, _counts(sets), *(one.text() for one in sets)] for sets in every
        ]
        notes, title = [_why_not(runs, family)], f"{meaning[0].upper()}{meaning[1:]}"
        if family == "paper" and coco_ee:
            head.append(OURS)
            rows = [[*row, published_number(sets) or "–"] for row, sets in zip(rows, every, strict=True)]
            notes.append(_other_towers(runs[0]))
        tables.append(Table(head, rows, "; ".join(filter(None, notes)), title))
        if family == "paper" and coco_ee:
            reported = [[method, *numbers] for method, numbers in PUBLISHED.items()]
            columns = ["method", *COLUMNS.values()]
            tables.append(Table(columns, reported, PUBLISHED_NOTE, "What the paper reports"))
    return tables


def _by_score(runs: Sequence[ScoredEdits], family: Family) -> list[tuple[Score, ...]]:
    """Return every score of a family, of each set."""
    every = zip(*(run.scores for run in runs), strict=True)
    return [sets for sets in every if sets[0].family == family]


def _counts(scores: Sequence[Score]) -> str:
    """Return how many images a score is made of: one number, or one for each set where they differ."""
    counts = [str(one.card.pictures) if one.run else "–" for one in scores]
    return counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def _why_not(runs: Sequence[ScoredEdits], family: Family) -> str:
    """Say why scores of a family were not run; where that is not so of every set alike, of which set."""
    absent: dict[str, list[str]] = {}
    for sets in _by_score(runs, family):
        whys = [one.why_not for one in sets]
        if len(set(whys)) == 1 and whys[0]:
            absent.setdefault(whys[0], []).append(sets[0].name)
            continue
        for run, why in zip(runs, whys, strict=True):
            if why:
                absent.setdefault(why, []).append(f"{sets[0].name} of {run.label}")
    return "; ".join(f"{', '.join(names)} {why}" for why, names in absent.items())


def _other_towers(run: ScoredEdits) -> str:
    """Say which scores of the paper's family rest on another tower than the paper's."""
    names: dict[str, list[str]] = {}
    for one in run.scores:
        if one.family == "paper" and (tower := _other_tower(one)):
            names.setdefault(tower, []).append(one.name)
    parts = [f"{', '.join(each)} by {tower}" for tower, each in names.items()]
    return f"{'; '.join(parts)}: not the paper's {PAPER_TOWER}, so no published number" if parts else ""


def paired_tables(runs: Sequence[ScoredEdits], bootstrap: Bootstrap) -> list[Table]:
    """Return a table for each family of what every set has more than the first, case by case."""
    tables = []
    for family, meaning in FAMILIES.items() if len(runs) > 1 else ():
        rows = []
        for sets in _by_score(runs, family):
            first, *others = [one.per_case for one in sets]
            if first is None or any(values is None for values in others):
                continue
            with np.errstate(invalid="ignore"):  # two perfect cases: infinite less infinite
                differences = [values - first for values in others if values is not None]
            pairs = [each[np.isfinite(each)] for each in differences]
            counts = [str(len(each)) for each in pairs]
            number = counts[0] if len(set(counts)) == 1 else " / ".join(counts)
            texts = (_difference_text(each, bootstrap) for each in pairs)
            rows.append([sets[0].name, sets[0].better, number, *texts])
        if rows:
            head = ["score", "better", "images", *(f"{run.label} − {runs[0].label}" for run in runs[1:])]
            tables.append(Table(head, rows, PAIRED_NOTE, f"Paired differences: {meaning}"))
    return tables


def _difference_text(differences: np.ndarray, bootstrap: Bootstrap) -> str:
    if len(differences) < 2:
        return "–"
    found = bootstrap.of_mean(differences)
    numbers = (found.value, found.low, found.high)
    value, low, high = (f"{'+' if one > 0 else ''}{short_number(one)}" for one in numbers)
    return f"{value} ({low} to {high})"


def card_facts(card: ScoreCard) -> list[tuple[str, str]]:
    """Return what a card says, (what, text), without what it leaves empty."""
    facts = []
    for name, value in asdict(card).items():
        text = reasons(value) or "nothing" if isinstance(value, dict) else str(value)
        if text:
            facts.append((CARD_NAMES.get(name, name), text))
    return facts


def markdown_page(title: str, tables: Sequence[Table], runs: Sequence[ScoredEdits] = ()) -> str:
    """Return tables and the identity cards of ``runs`` (there may be none) as Markdown."""
    parts = [f"# {title}"]
    for table in tables:
        parts += [f"## {table.title}", markdown(table).rstrip("\n")]
    if runs:
        parts.append("## Identity cards")
    for run in runs:
        for one in run.scores:
            if one.run:
                facts = "; ".join(f"{what}: {value}" for what, value in card_facts(one.card))
                parts.append(f"- **{one.name}**, {run.label}. {facts}")
    return "\n\n".join(parts) + "\n"
