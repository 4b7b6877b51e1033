"""The report of an ablation: results.json, tables as Markdown and LaTeX, plot, strip, and one page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pbe.editing.images import grey_out
from pbe.errors import UserError
from pbe.evaluation.ablation.config import BY_ROW, Ablation
from pbe.evaluation.ablation.measuring import read_edits
from pbe.evaluation.ablation.plan import PICTURES, Plan
from pbe.evaluation.ablation.results import UNDECIDED, Difference, Results, changes, gather
from pbe.evaluation.ablation.stages import Stage, write_json
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.metrics.base import FAMILIES
from pbe.evaluation.metrics.bootstrap import Estimate
from pbe.evaluation.report import Table, markdown, sheet
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
    sections = sections_of(results)
    changed = [
        Changed(cell.row.title, before.row.title if before else "", changes(before, cell))
        for before, cell in results.compared()
    ]
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
    config = ablation.config
    shown = {
        name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in pictures.items()
    }
    page = render_page(  # which holds its images
        TEMPLATE, title=config.title or f"Ablation {config.name}", sections=sections, changed=changed,
        pictures=shown, not_run=results.not_run, seeds=config.seeds,
    )  # fmt: skip
    write_output(folder / "index.html", page)
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
    """Return the table of scores: a line for each row (name, title), a column for each metric (name, better).

    ``values`` are by name of the row and metric.
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


def plot(results: Results) -> bytes:
    """Draw score ``plot_y`` against ``plot_x``, with intervals, every seed faintly; returns a PNG."""
    from matplotlib.figure import Figure  # slow to import

    options, rows = results.ablation.config.evaluation, results.ablation.rows
    made = [name for name, _, _ in results.metrics]
    wanted = [name for name in (options.plot_x, options.plot_y) if name != BY_ROW]
    for name in wanted:
        if name not in made:
            raise UserError(f"the plot shows '{name}', which was not scored; there are: {', '.join(made)}")
    by_row = options.plot_x == BY_ROW
    figure = Figure(figsize=(7.0, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    points = []
    for place, row in enumerate(rows):
        up = results.estimates[row.name, options.plot_y]
        across = Estimate(place, place, place) if by_row else results.estimates[row.name, options.plot_x]
        points.append((across.value, up.value))
        axes.errorbar(
            across.value, up.value, xerr=None if by_row else _bars(across), yerr=_bars(up), fmt="o",
            color=f"C{place % 10}", capsize=3, zorder=3,
        )  # fmt: skip
        seeds = results.scores[row.name, options.plot_y]
        beside = seeds if by_row else results.scores[row.name, options.plot_x]
        x, y = ([place if by_row else one.value for one in beside], [one.value for one in seeds])
        axes.scatter(x, y, s=12, color=f"C{place % 10}", alpha=0.4)
        if not by_row:
            beside_point = (7, -14 if place % 2 else 7)  # neighbours often lie close together
            axes.annotate(row.title, points[-1], xytext=beside_point, textcoords="offset points", fontsize=8)
    axes.plot(*zip(*points, strict=True), color="0.7", linewidth=1, zorder=1)
    if by_row:
        axes.set_xticks(range(len(rows)), [row.title for row in rows], rotation=20, ha="right", fontsize=8)
    else:
        axes.set_xlabel(options.plot_x)
    axes.set_ylabel(options.plot_y)
    axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _bars(estimate: Estimate) -> list[list[float]]:
    ends = (estimate.value - estimate.low, estimate.high - estimate.value)
    return [[max(end, 0.0)] for end in ends]


def strip(results: Results, cases: int) -> np.ndarray:
    """Draw the first cases with the edits of every row's first seed; returns uint8 ``h w 3``.

    Where the cases were also edited with the hidden objects as exemplars, a second band shows these edits.
    """
    plan, rows = results.plan, results.ablation.rows
    cells = {row.name: plan.of(row.name)[0] for row in rows}
    bands = [_band(results, plan.benchmark, cases, {name: cell.edits for name, cell in cells.items()})]
    if plan.own_benchmark is not None:
        own = {name: cell.own_edits for name, cell in cells.items() if cell.own_edits is not None}
        bands.append(_band(results, plan.own_benchmark, cases, own))
    return np.concatenate(bands)


def _band(results: Results, folder: Path, cases: int, edits: dict[str, Stage]) -> np.ndarray:
    benchmark = BenchmarkFolder(folder)
    shown = [benchmark[number] for number in range(min(cases, len(benchmark)))]
    lines: dict[str, list[np.ndarray]] = {
        "masked": [grey_out(case.image, case.mask > 127) for case in shown],
        "exemplar": [case.exemplar for case in shown],
    }
    for number, (name, stage) in enumerate(edits.items(), 1):
        made = read_edits(stage.folder / PICTURES, benchmark)[: len(shown)]
        label = _short(results.titles[name])
        label = label if label not in lines else _short(f"{number}: {label}")
        lines[label] = [edit for edit in made if edit is not None]
    lines["true object"] = [case.image for case in shown]
    return sheet(lines, columns=min(len(shown), 16))


def _short(title: str) -> str:
    """Cut a title to what fits beside the strip."""
    return title if len(title) <= 22 else f"{title[:21]}…"


def png(picture: np.ndarray) -> bytes:
    """Return an image, uint8 ``h w 3``, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
