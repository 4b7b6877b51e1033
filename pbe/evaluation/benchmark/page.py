"""Tables, page and identity cards of an evaluation, with the numbers that the paper reports.

The paper's numbers belong to all 3500 cases of COCOEE, to CLIP ViT-B/32 and to COCO test2017 as the real
images; none was measured here, and each says how sure it is. On another benchmark they say nothing, and are
not shown.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pbe.data.randomness import permutation
from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.benchmark.edits import EditFolder
from pbe.evaluation.metrics.base import FAMILIES, Family, Score, ScoreCard, reasons, short_number
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.towers import TOWERS
from pbe.evaluation.report import Table, markdown
from pbe.html import Tile

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
    "pictures": "images",
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
TEMPLATE = Path(__file__).with_name("page.html.j2")
TILE = 256  # longest side of an image on the page
# Scores that tell good edits from bad ones come first where no other is asked for.
PREFERRED = ("region", "similarity", "copy-paste", "seam")


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
    kept = {
        one.name: finite
        for one in scores
        if one.per_case is not None and len(finite := one.per_case[np.isfinite(one.per_case)])
    }
    usable = {one.name: one for one in scores if one.name in kept}
    if name:
        if name not in usable:
            raise UserError(f"edits cannot be ranked by '{name}'; there are: {', '.join(usable)}")
        return usable[name]
    telling = [one for one in usable.values() if np.ptp(kept[one.name]) > 0.0]
    preferred = (one for part in PREFERRED for one in telling if part in one.name)
    return next(preferred, telling[0] if telling else None)


def picks(score: Score | None, available: Sequence[int], count: int, seed: int) -> dict[str, list[int]]:
    """Return, by kind, ``count`` of the positions that can be shown.

    They are the best, the worst, where there is a score, and random ones in the benchmark's order.
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
