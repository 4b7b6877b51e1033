"""Tables of an ablation as Markdown and LaTeX, and how rows differ in their settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pbe.config import to_dict
from pbe.evaluation.ablation.fingerprints import ASIDE
from pbe.evaluation.ablation.plan import Cell
from pbe.evaluation.ablation.statistics import UNDECIDED, Difference
from pbe.evaluation.metrics.bootstrap import Estimate
from pbe.evaluation.report.tables import Table

ARROWS = {"higher": "↑", "lower": "↓", "": ""}
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "→": r"$\rightarrow$", "–": "--", "−": "$-$", "×": r"$\times$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "*": "{*}",
}  # fmt: skip


PACKAGES = r"% needs \usepackage{longtable,booktabs}"


@dataclass(frozen=True)
class ScoreTable(Table):
    """Scores as columns, rows as lines; LaTeX turns it, since there are more scores than a page is wide."""


def number(value: float) -> str:
    """Return a score as tables show it; ``exact`` for the infinite PSNR of equal pictures."""
    if math.isnan(value):
        return "not run"
    if math.isinf(value):
        return "exact"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def interval(estimate: Estimate) -> str:
    """Return a score with its interval."""
    if not math.isfinite(estimate.value) or math.isnan(estimate.low):
        return number(estimate.value)
    return f"{number(estimate.value)} ({number(estimate.low)} to {number(estimate.high)})"


def score_table(
    rows: Sequence[tuple[str, str]],
    metrics: Sequence[tuple[str, str]],
    values: dict[tuple[str, str], Estimate],
    note: str,
) -> ScoreTable:
    """Return the table of scores.

    Args:
        rows: names and titles.
        metrics: name and better direction (``higher``, ``lower``) of the columns.
        values: by name of the row and metric.
        note: below the table.
    """
    head = ["", *(f"{name} {ARROWS[better]}".strip() for name, better in metrics)]
    body = [[title, *(interval(values[row, name]) for name, _ in metrics)] for row, title in rows]
    return ScoreTable(head, body, note)


def difference_table(differences: Sequence[Difference], titles: dict[str, str], note: str) -> Table:
    """Return the table of comparisons; what the interval does not decide is written as undecided."""
    body = []
    for one in differences:
        bounds = "none" if math.isnan(one.low) else f"{one.low:+.3f} to {one.high:+.3f}"
        said = UNDECIDED if one.verdict == UNDECIDED else f"{titles[one.second]} is {one.verdict}"
        pair = f"{titles[one.second]} − {titles[one.first]}"
        body.append([f"log {one.metric}" if one.log else one.metric, pair, f"{one.value:+.3f}", bounds, said])
    return Table(["score", "rows", "difference", "interval", "verdict"], body, note)


def markdown(table: Table) -> str:
    """Return a table as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = "|" + "---|" * len(table.head)
    text = "\n".join([line(table.head), rule, *(line(row) for row in table.rows)])
    return f"{text}\n\n{table.note}\n" if table.note else f"{text}\n"


def latex(table: Table) -> str:
    """Return a table as LaTeX that breaks over pages and is as wide as the text.

    It needs the packages longtable and booktabs. Scores stand as lines, rows as columns.
    """

    def line(cells: Sequence[str]) -> str:
        return " & ".join(escape(cell) for cell in cells) + r" \\"

    head, *rows = _turned(table)
    column = rf"p{{\dimexpr\linewidth/{len(head)}-2\tabcolsep\relax}}"
    lines = [
        PACKAGES, r"\begingroup\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\begin{{longtable}}{{{column * len(head)}}}", r"\toprule", line(head), r"\midrule", r"\endhead",
        r"\bottomrule", r"\endfoot", *(line(row) for row in rows), r"\end{longtable}",
    ]  # fmt: skip
    if table.note:
        lines.append(rf"\noindent {escape(table.note)}\par")
    return "\n".join([*lines, r"\endgroup"]) + "\n"


def _turned(table: Table) -> list[Sequence[str]]:
    """Return the lines of a table, the head first; those of scores are its columns."""
    lines = [table.head, *table.rows]
    return list(zip(*lines, strict=True)) if isinstance(table, ScoreTable) else lines


def escape(text: str) -> str:
    """Return text with everything escaped that LaTeX would read as a command."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def changes(before: Cell | None, cell: Cell) -> list[tuple[str, str, str]]:
    """Return (key, old, new) of what a row sets otherwise than the one before it, sampling included.

    Args:
        before: the row to compare with; None compares with nothing, so there is no difference.
        cell: the row.
    """
    if before is None:
        return []
    old, new = settings_of(before), settings_of(cell)
    return [(key, _text(old.get(key)), _text(value)) for key, value in new.items() if old.get(key) != value]


def settings_of(cell: Cell) -> dict[str, Any]:
    """Return all settings of a row that shape its results, by dotted key."""
    values = to_dict(cell.config)
    for section, keys in ASIDE.items():
        for key in keys:
            (values[section] if section else values).pop(key, None)
    values["cache"] = {"variants": cell.config.cache.variants}
    start = cell.row.start or "random weights"
    return {"start": start, **_flat(values), **_flat({"sampling": vars(cell.row.sampling)})}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
