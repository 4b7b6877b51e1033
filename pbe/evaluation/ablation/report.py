"""The report of an ablation: results.json, tables as Markdown and LaTeX, plot, strip, and one page."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

from pbe.errors import UserError
from pbe.evaluation.ablation.config import Ablation
from pbe.evaluation.ablation.figures import plot, png, strip
from pbe.evaluation.ablation.plan import Plan
from pbe.evaluation.ablation.results import Results, gather
from pbe.evaluation.ablation.stages import write_json
from pbe.evaluation.ablation.statistics import Difference
from pbe.evaluation.ablation.tables import changes, difference_table, latex, markdown, score_table
from pbe.evaluation.metrics.base import FAMILIES
from pbe.evaluation.report.tables import Table
from pbe.files import make_folder
from pbe.html import render_page

TEMPLATE = Path(__file__).with_name("page.html.j2")


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
    """Write everything into the plan's folder of results; returns the page.

    Raises:
        UserError: the scores are not there or do not fit together, or the folder cannot be written to.
    """
    results, folder = gather(ablation, plan), make_folder(plan.results)
    sections, changed = sections_of(results), changes_of(results)
    write_json(folder / "results.json", results.to_dict())
    _write(folder / "tables.md", markdown_page(results, sections, changed).encode())
    _write(folder / "tables.tex", "\n".join(_latex_parts(sections)).encode())
    pictures = {"strip": png(strip(results, ablation.config.evaluation.strip_cases))}
    if ablation.config.evaluation.plot_y:
        try:
            pictures["plot"] = plot(results)
        except UserError as error:  # a score that wants weights that are not here; the rest stands
            print(f"no plot: {error}")
    for name, content in pictures.items():
        _write(folder / f"{name}.png", content)
    _write(folder / "index.html", page(results, sections, changed, pictures).encode())
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
    rows, cumulative, made = results.ablation.rows, results.ablation.config.cumulative, []
    for number, row in enumerate(rows):
        before = None if not number else rows[number - 1 if cumulative else 0]
        cells = [results.plan.of(one.name)[0] if one else None for one in (before, row)]
        assert cells[1] is not None
        made.append(Changed(row.title, before.title if before else "", changes(cells[0], cells[1])))
    return made


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
        parts += [f"% {section.title}", latex(section.scores)]
        if section.differences is not None:
            parts.append(latex(section.differences))
    return parts


def page(
    results: Results, sections: list[Section], changed: list[Changed], pictures: dict[str, bytes]
) -> str:
    """Return the page's HTML, which holds its pictures and needs no network; all texts are escaped."""
    shown = {
        name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in pictures.items()
    }
    config = results.ablation.config
    return render_page(
        TEMPLATE,
        title=config.title or f"Ablation {config.name}",
        sections=sections,
        changed=changed,
        pictures=shown,
        not_run=results.not_run,
        seeds=config.seeds,
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
