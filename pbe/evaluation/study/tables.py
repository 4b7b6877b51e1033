"""Tabulating a human study: mean ranks, first places, pairwise wins with intervals, and agreement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbe.data.randomness import generator
from pbe.errors import UserError
from pbe.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Estimate
from pbe.evaluation.study.making import KEY_FORMAT

FORMAT = "pbe-rankings-1"


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
        raise UserError(f"'{path}' is cut short or no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise UserError(f"'{path}' is no {kind}: its format is not {form}")
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
            raise UserError(f"'{path}' is a damaged key of a study: group {name} has not one edit a system")
    return key


def read_rankings(paths: Sequence[Path], key: StudyKey, *, partial: bool = False) -> dict[str, np.ndarray]:
    """Read the files of all raters.

    Args:
        paths: one file a rater.
        key: of the study.
        partial: take files that lack groups.

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

    Intervals are percentile bootstrap intervals: raters and groups are both drawn anew, with replacement.

    Args:
        ranks: ``raters groups systems``, NaN where there is none.
        systems: names.
        seed: of the bootstrap.
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
    head = ["system", "mean rank", "first places", *(f"before {name}" for name in systems)]
    lines = [head, ["---"] * len(head)]
    for name in systems:
        wins = ["–" if other == name else str(summary.wins[name, other]) for other in systems]
        lines.append([name, str(summary.mean_rank[name]), str(summary.first[name]), *wins])
    agreement = "" if summary.agreement is None else f"; Kendall's W {summary.agreement:.3f}"
    note = (
        f"{summary.raters} raters, {summary.rankings} rankings{agreement}. In brackets {LEVEL:.0%} bootstrap "
        f"intervals over raters and groups, {RESAMPLES} resamples."
    )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {question}\n\n{table}\n\n{note}\n"
