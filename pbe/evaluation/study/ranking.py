"""A human study as one static page: edits of several systems side by side, blinded, to be ranked.

The form is that of the paper's study (30 groups, ranks 1 to 5 for quality and for consistency). The page
knows images by opaque names only; ``key.json``, which whoever runs the study keeps, says whose they are. It
lies outside the folder to publish, and holds the random salt that the names are hashes with: whoever guesses
the systems' names, the seed and the program cannot compute whose an image is.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pbe.data.randomness import generator, permutation
from pbe.editing.batch.records import write_image, write_json
from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.benchmark.edits import EditFolder
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Estimate
from pbe.evaluation.report import Table, markdown
from pbe.files import expand_home, make_folder
from pbe.html import data_uri, render_page, write_html

TEMPLATE = Path(__file__).with_name("page.html.j2")
KEY = "key.json"
KEY_FORMAT = "pbe-study-key-1"
PAGE = "page"
PICTURES = "pictures"
MAX_SYSTEMS = 9  # as many as there are digits to press
QUESTIONS = {
    "quality": "Which edit looks best? Rank them from the most to the least realistic image.",
    "consistency": (
        "Which edit shows the reference's object? Rank them from the most to the least like the reference."
    ),
}
FORMAT = "pbe-rankings-1"


@dataclass(frozen=True)
class StudySettings:
    """What a study is made of.

    Attributes:
        groups: number of cases to rank, drawn from those that every system has an edit of.
        seed: of the draw of cases.
        title: of the page.
        copy: put the images beside the page instead of into it.
    """

    groups: int = 30
    seed: int = 0
    title: str = "Which edit is better?"
    copy: bool = False


def make_study(
    systems: Mapping[str, Path], benchmark: BenchmarkFolder, out: Path, settings: StudySettings
) -> Path:
    """Write the page and its key, which no two calls make alike; return the page's path.

    The systems are folders of edits by name. The new folder ``out`` gets ``key.json``, and ``page/``, which
    may be published: ``index.html`` and, with ``copy``, ``pictures/``.
    """
    if not 2 <= len(systems) <= MAX_SYSTEMS:
        raise UserError(f"a study compares 2 to {MAX_SYSTEMS} systems, not {len(systems)}")
    if settings.groups < 1:
        raise UserError("a study needs at least one group")
    folders = {name: EditFolder(folder, benchmark) for name, folder in systems.items()}
    chosen = _choose(folders, benchmark, settings)
    for position in chosen:
        benchmark[position]  # what cannot be read is told before the folder is begun
    if any(make_folder(out).iterdir()):
        raise UserError(f"'{out}' is not empty; name a new folder")
    published = make_folder(out / PAGE)
    groups, key = [], {}
    salt = secrets.token_hex(16)
    for number, position in enumerate(chosen, start=1):
        name = f"{number:02d}"
        owners = {_opaque(salt, name, system): system for system in folders}
        edits = {opaque: folders[system][position] for opaque, system in owners.items()}
        groups.append(_group(name, benchmark[position], edits, published if settings.copy else None))
        key[name] = {"case": benchmark.ids[position], "edits": owners}
    study = _opaque(salt, "study")
    content: dict[str, Any] = {"format": KEY_FORMAT, "study": study, "salt": salt, "systems": sorted(systems)}
    content |= {"questions": list(QUESTIONS), "benchmark": benchmark.sha256, "groups": key}
    write_json(out / KEY, content)
    questions = [{"id": name, "text": text} for name, text in QUESTIONS.items()]
    data = {"study": study, "title": settings.title, "questions": questions, "groups": groups}
    page = render_page(TEMPLATE, title=settings.title, data=data)
    write_html(page, published / "index.html")
    return published / "index.html"


def _opaque(salt: str, *what: str) -> str:
    """Return the name of a thing that only those can tell who have the salt."""
    return hashlib.sha256("\0".join((salt, *what)).encode()).hexdigest()[:16]


def _choose(
    folders: Mapping[str, EditFolder], benchmark: BenchmarkFolder, settings: StudySettings
) -> list[int]:
    """Return positions of the cases, in the order drawn, that every system has a whole edit of."""
    chosen: list[int] = []
    for position in permutation(len(benchmark), settings.seed, "study-cases"):
        if len(chosen) == settings.groups:
            break
        if all(folder[int(position)] is not None for folder in folders.values()):  # None: another size, too
            chosen.append(int(position))
    if len(chosen) < settings.groups:
        raise UserError(
            f"only {len(chosen)} cases have whole edits by all systems, not {settings.groups} as asked for"
        )
    return chosen


def _group(
    name: str, case: Case, edits: Mapping[str, np.ndarray | None], copy_to: Path | None
) -> dict[str, Any]:
    """Return what the page shows of a group, whose edits have their opaque names.

    Files are written in the order of these, since they tell when they were written.
    """

    def address(what: str, image: np.ndarray) -> str:
        if copy_to is None:
            return data_uri(image)
        file = f"{name}-{what}.png"
        write_image(make_folder(copy_to / PICTURES) / file, Image.fromarray(image))
        return f"{PICTURES}/{file}"

    shown = {"source": case.image, "hole": case.masked, "exemplar": case.exemplar}
    addresses = {what: address(what, image) for what, image in shown.items()}
    listed = []
    for opaque, edit in sorted(edits.items()):
        assert edit is not None
        listed.append({"id": opaque, "src": address(opaque, edit)})
    return {"id": name, **addresses, "edits": listed}


def parse_systems(texts: Sequence[str]) -> dict[str, Path]:
    """Read ``name=folder`` pairs."""
    systems: dict[str, Path] = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not (separator and name.strip() and folder):
            raise UserError(f"'{text}' does not name a system; write name=folder")
        if name.strip() in systems:
            raise UserError(f"the system '{name.strip()}' is named twice")
        systems[name.strip()] = Path(expand_home(folder))
    return systems


@dataclass(frozen=True)
class StudyKey:
    """What ``key.json`` says.

    Attributes:
        study: name of the study.
        systems: names, in order.
        questions: names.
        groups: group to opaque name of an edit to its system.
    """

    study: str
    systems: list[str]
    questions: list[str]
    groups: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Summary:
    """Answers to one question.

    Attributes:
        mean_rank: by system; 1 is best.
        first: share of the rankings that a system leads, by system.
        wins: (one, other) to the share of the rankings in which one stands before the other.
        agreement: Kendall's W between raters, mean over the groups with two raters or more; None without.
        raters: number of them.
        rankings: number of them.
    """

    mean_rank: dict[str, Estimate]
    first: dict[str, Estimate]
    wins: dict[tuple[str, str], Estimate]
    agreement: float | None
    raters: int
    rankings: int


def _read(path: Path, kind: str, form: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is truncated or not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise UserError(f"'{path}' is not a {kind}: its format is not {form}")
    return content


def read_key(path: Path) -> StudyKey:
    """Read ``key.json``."""
    content = _read(path, "key of a study", KEY_FORMAT)
    try:
        groups = {
            str(name): {str(edit): str(owner) for edit, owner in group["edits"].items()}
            for name, group in content["groups"].items()
        }
        systems, questions = ([str(name) for name in content[part]] for part in ("systems", "questions"))
        key = StudyKey(str(content["study"]), systems, questions, groups)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is a damaged key of a study") from error
    if not key.questions or not key.groups or len(key.systems) < 2:
        raise UserError(f"'{path}' is a damaged key of a study: it lacks questions, groups or systems")
    for name, owners in groups.items():
        if sorted(owners.values()) != sorted(systems):
            raise UserError(
                f"'{path}' is a damaged key of a study: group {name} lacks an edit or has two of one system"
            )
    return key


def read_rankings(paths: Sequence[Path], key: StudyKey, *, partial: bool = False) -> dict[str, np.ndarray]:
    """Read the files of all raters, with ``partial`` also those that lack groups.

    Returns:
        Question to ranks, float64 ``raters groups systems`` in the key's order: 1 to the number of systems,
        and NaN for a group that a rater did not rank.
    """
    if not paths:
        raise UserError("there are no rankings to tabulate")
    shape = (len(paths), len(key.groups), len(key.systems))
    ranks = {question: np.full(shape, np.nan) for question in key.questions}
    raters: dict[str, Path] = {}
    for number, path in enumerate(paths):
        content = _read(path, "file of rankings", FORMAT)
        if content.get("study") != key.study:
            raise UserError(f"'{path}' belongs to another study ({content.get('study')}, not {key.study})")
        rater = str(content.get("rater") or "").strip()
        if not rater:
            raise UserError(f"'{path}' does not say whose rankings it holds: it has no rater")
        if rater in raters:
            raise UserError(f"'{path}' and '{raters[rater]}' are both of the rater '{rater}'")
        raters[rater] = path
        rankings = content.get("rankings")
        if not isinstance(rankings, dict) or not set(rankings) <= set(key.groups):
            raise UserError(f"'{path}' ranks groups that the study does not have")
        missing = _fill(ranks, number, path, rankings, key)
        if missing and not partial:
            total = len(key.groups) * len(key.questions)
            raise UserError(f"'{path}' lacks {missing} of {total} rankings; --partial takes what is there")
    return ranks


def _fill(
    ranks: dict[str, np.ndarray], rater: int, path: Path, rankings: dict[str, Any], key: StudyKey
) -> int:
    """Write a rater's ranks; return how many rankings are missing."""
    missing = 0
    for place, (group, owners) in enumerate(key.groups.items()):
        answers = rankings.get(group, {})
        for question, array in ranks.items():
            order = answers.get(question) if isinstance(answers, dict) else answers
            if order is None:
                missing += 1
                continue
            if not isinstance(order, list) or sorted(map(str, order)) != sorted(owners):
                raise UserError(f"'{path}': group {group}, {question}: not every edit is ranked once")
            for rank, edit in enumerate(order, start=1):
                array[rater, place, key.systems.index(owners[edit])] = rank
    return missing


def kendall_w(ranks: np.ndarray) -> float:
    """Return Kendall's coefficient of concordance of ``(raters, systems)`` ranks without ties, 0 to 1.

    W = 12 S / (m^2 (n^3 - n)) with the squared deviations S of the systems' rank sums (Kendall and Babington
    Smith, 1939).
    """
    m, n = ranks.shape
    sums = ranks.sum(axis=0)
    return float(12.0 * np.sum((sums - sums.mean()) ** 2) / (m**2 * (n**3 - n)))


def summarise(ranks: np.ndarray, systems: Sequence[str], seed: int = 0) -> Summary:
    """Summarise the ranks of one question.

    Intervals are percentile bootstrap intervals: raters and groups are both drawn anew, with replacement. The
    ranks are ``raters groups systems``, NaN where there is none.
    """
    there = np.isfinite(ranks[:, :, 0])
    if not there.any():
        raise UserError("there are no rankings to tabulate")
    pairs = [(i, j) for i in range(len(systems)) for j in range(len(systems)) if i != j]
    before = [ranks[..., i] < ranks[..., j] for i, j in pairs]
    numbers = np.concatenate([ranks, ranks == 1, np.stack(before, axis=-1)], axis=-1)
    estimates = _intervals(np.where(there[..., None], numbers, 0.0), there, seed)
    n = len(systems)
    by_group = [kendall_w(ranks[here, g]) for g, here in enumerate(there.T) if here.sum() > 1]
    return Summary(
        mean_rank=dict(zip(systems, estimates[:n], strict=True)),
        first=dict(zip(systems, estimates[n : 2 * n], strict=True)),
        wins={(systems[i], systems[j]): e for (i, j), e in zip(pairs, estimates[2 * n :], strict=True)},
        agreement=float(np.mean(by_group)) if by_group else None,
        raters=int(there.any(axis=1).sum()),
        rankings=int(there.sum()),
    )


def _intervals(numbers: np.ndarray, there: np.ndarray, seed: int) -> list[Estimate]:
    """Return means of ``raters groups k`` over raters and groups that are there, with intervals."""
    raters, groups, k = numbers.shape
    rng = generator(seed, "study-bootstrap")
    rater_counts = rng.multinomial(raters, np.full(raters, 1 / raters), RESAMPLES).astype(np.float64)
    group_counts = rng.multinomial(groups, np.full(groups, 1 / groups), RESAMPLES).astype(np.float64)
    sums = (rater_counts @ numbers.reshape(raters, -1)).reshape(RESAMPLES, groups, k)
    total = np.einsum("bg,bgk->bk", group_counts, sums)
    weight = np.einsum("bg,bg->b", group_counts, rater_counts @ there)
    drawn = total[weight > 0] / weight[weight > 0, None]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    means = numbers.sum(axis=(0, 1)) / there.sum()
    return [Estimate(float(m), float(a), float(b)) for m, a, b in zip(means, low, high, strict=True)]


def study_markdown(question: str, summary: Summary) -> str:
    """Return the tables of one question as Markdown, systems by mean rank."""
    systems = sorted(summary.mean_rank, key=lambda name: summary.mean_rank[name].value)
    rows = []
    for name in systems:
        wins = ["–" if other == name else str(summary.wins[name, other]) for other in systems]
        rows.append([name, str(summary.mean_rank[name]), str(summary.first[name]), *wins])
    agreement = "" if summary.agreement is None else f"; Kendall's W {summary.agreement:.3f}"
    note = (
        f"{summary.raters} raters, {summary.rankings} rankings{agreement}. In brackets {LEVEL:.0%} bootstrap "
        f"intervals over raters and groups, {RESAMPLES} resamples."
    )
    head = ["system", "mean rank", "first places", *(f"before {name}" for name in systems)]
    return f"## {question}\n\n{markdown(Table(head, rows, note))}"
