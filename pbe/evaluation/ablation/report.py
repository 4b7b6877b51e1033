"""The report of an ablation: results.json, tables as Markdown and LaTeX, plot, strip, and one page."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pbe.errors import UserError
from pbe.evaluation.ablation.config import Ablation
from pbe.evaluation.ablation.figures import plot, png, strip
from pbe.evaluation.ablation.plan import Plan
from pbe.evaluation.ablation.results import Results, changes, gather
from pbe.evaluation.ablation.stages import write_json
from pbe.evaluation.ablation.statistics import UNDECIDED, Difference
from pbe.evaluation.metrics.base import FAMILIES
from pbe.evaluation.metrics.bootstrap import Estimate
from pbe.evaluation.report.tables import Table, markdown
from pbe.files import make_folder, write_output
from pbe.html import render_page

TEMPLATE = Path(__file__).with_name("page.html.j2")
ARROWS = {"higher": "↑", "lower": "↓", "": ""}
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "→": r"$\rightarrow$", "–": "--", "−": "$-$", "×": r"$\times$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "*": "{*}",
}  # fmt: skip
PACKAGES = r"% needs \usepackage{longtable,booktabs}"


@dataclass(frozen=True)
class Changed:
    """What a row sets otherwise than the one that it is compared with: (key, old, new)."""

    title: str
    before: str
    changes: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Section:
    """Scores of one family: their table, and what is compared by them."""

    title: str
    scores: Table
    differences: Table | None


def write_report(ablation: Ablation, plan: Plan) -> Path:
    """Write everything into the plan's folder of results; returns the page."""
    results, folder = gather(ablation, plan), make_folder(plan.results)
    sections, changed = sections_of(results), changes_of(results)
    write_json(folder / "results.json", results.to_dict())
    write_output(folder / "tables.md", markdown_page(results, sections, changed))
    write_output(folder / "tables.tex", "\n".join(_latex_parts(sections)))
    pictures = {"strip": png(strip(results, ablation.config.evaluation.strip_cases))}
    if ablation.config.evaluation.plot_y:
        try:
            pictures["plot"] = plot(results)
        except UserError as error:  # a score that wants weights that are not here; the rest stands
            print(f"no plot: {error}")
    for name, content in pictures.items():
        write_output(folder / f"{name}.png", content)
    write_output(folder / "index.html", page(results, sections, changed, pictures))
    return folder / "index.html"


def sections_of(results: Results) -> list[Section]:
    """Return the tables, one section a family: scores of two families never stand in one table."""
    made = []
    rows = [(row.name, row.title) for row in results.ablation.rows]
    for family, title in FAMILIES.items():
        metrics = [(name, better) for name, of, better in results.metrics if of == family]
        if not metrics:
            continue
        names = {name for name, _ in metrics}
        values = {(row, name): results.estimates[row, name] for row, _ in rows for name in names}
        compared = [one for one in results.differences if one.metric in names]
        table = score_table(rows, metrics, values, score_note(results))
        made.append(Section(title, table, _compared(results, compared)))
    return made


def _compared(results: Results, differences: list[Difference]) -> Table | None:
    differences = [one for one in differences if not one.value == one.low == one.high == 0.0]
    if not differences:
        return None
    note = (
        "Paired bootstrap over cases, widened by Student's t for how much trainings with other seeds vary, "
        "pooled over the comparisons; a difference whose interval holds 0 is undecided. Scores that are "
        "geometric means are compared by logarithms; those of whole sets are not paired. "
        "Scores that are equal in every case are left out. No correction for the number of comparisons."
    )
    return difference_table(differences, results.titles, note)


def score_note(results: Results) -> str:
    """Return what the tables of scores rest on."""
    config = results.ablation.config
    seeds = ", ".join(map(str, config.seeds))
    measured = [one.per_case for cell in results.scores.values() for one in cell]
    cases = max((len(values) for values in measured if values is not None), default=0)
    counted = f"{cases} cases, " if cases else ""
    return (
        f"Mean over {counted}training seeds {seeds}; in brackets the {config.evaluation.level:.0%} interval: "
        "bootstrap over cases, widened by Student's t for how much trainings with other seeds vary, pooled "
        "over the rows. ↑: more is better, ↓: less is better."
    )


def changes_of(results: Results) -> list[Changed]:
    """Return the config difference of each row: to the row before it, or to the first one."""
    return [
        Changed(cell.row.title, before.row.title if before else "", changes(before, cell))
        for before, cell in results.compared()
    ]


def markdown_page(results: Results, sections: list[Section], changed: list[Changed]) -> str:
    """Return tables and config differences as Markdown."""
    parts = []
    for section in sections:
        parts += [f"### {section.title[0].upper()}{section.title[1:]}", markdown(section.scores)]
        if section.differences is not None:
            parts.append(markdown(section.differences))
    if results.not_run:
        parts.append("Not run: " + "; ".join(f"{name} ({why})" for name, why in results.not_run) + ".\n")
    parts.append("### What each row changes")
    for one in changed:
        what = [f"- `{key}`: {old} → {new}" for key, old, new in one.changes]
        beside = f", beside {one.before}" if one.before else ", the first row"
        parts.append(f"**{one.title}**{beside}\n\n" + ("\n".join(what) or "- nothing") + "\n")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _latex_parts(sections: list[Section]) -> list[str]:
    parts = []
    for section in sections:
        parts += [f"% {section.title}", latex(section.scores, turned=True)]
        if section.differences is not None:
            parts.append(latex(section.differences))
    return parts


def page(
    results: Results, sections: list[Section], changed: list[Changed], pictures: dict[str, bytes]
) -> str:
    """Return the page's HTML, which holds its images and needs no network; all texts are escaped."""
    shown = {
        name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in pictures.items()
    }
    config = results.ablation.config
    return render_page(
        TEMPLATE, title=config.title or f"Ablation {config.name}", sections=sections, changed=changed,
        pictures=shown, not_run=results.not_run, seeds=config.seeds,
    )  # fmt: skip


def number(value: float) -> str:
    """Return a score as tables show it; ``exact`` for the infinite PSNR of equal images."""
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
) -> Table:
    """Return the table of scores.

    Args:
        rows: names and titles.
        metrics: name and better direction (``higher``, ``lower``) of the columns.
        values: by name of the row and metric.
        note: below the table.
    """
    head = ["", *(f"{name} {ARROWS[better]}".strip() for name, better in metrics)]
    body = [[title, *(interval(values[row, name]) for name, _ in metrics)] for row, title in rows]
    return Table(head, body, note)


def difference_table(differences: Sequence[Difference], titles: dict[str, str], note: str) -> Table:
    """Return the table of comparisons; what the interval does not decide is written as undecided."""
    body = []
    for one in differences:
        bounds = "none" if math.isnan(one.low) else f"{one.low:+.3f} to {one.high:+.3f}"
        said = UNDECIDED if one.verdict == UNDECIDED else f"{titles[one.second]} is {one.verdict}"
        pair = f"{titles[one.second]} − {titles[one.first]}"
        body.append([f"log {one.metric}" if one.log else one.metric, pair, f"{one.value:+.3f}", bounds, said])
    return Table(["score", "rows", "difference", "interval", "verdict"], body, note)


def latex(table: Table, *, turned: bool = False) -> str:
    """Return a table as LaTeX that breaks over pages and is as wide as the text.

    It needs the packages longtable and booktabs. ``turned`` makes lines of columns: there are more scores
    than a page is wide.
    """

    def line(cells: Sequence[str]) -> str:
        return " & ".join(escape(cell) for cell in cells) + r" \\"

    lines = [table.head, *table.rows]
    head, *rows = zip(*lines, strict=True) if turned else lines
    column = rf"p{{\dimexpr\linewidth/{len(head)}-2\tabcolsep\relax}}"
    parts = [
        PACKAGES, r"\begingroup\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\begin{{longtable}}{{{column * len(head)}}}", r"\toprule", line(head), r"\midrule", r"\endhead",
        r"\bottomrule", r"\endfoot", *(line(row) for row in rows), r"\end{longtable}",
    ]  # fmt: skip
    if table.note:
        parts.append(rf"\noindent {escape(table.note)}\par")
    return "\n".join([*parts, r"\endgroup"]) + "\n"


def escape(text: str) -> str:
    """Return text with everything escaped that LaTeX would read as a command."""
    return "".join(LATEX.get(letter, letter) for letter in text)
