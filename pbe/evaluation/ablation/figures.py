"""Figures of an ablation: a plot of the rows' scores, and a strip of the same edits across rows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pbe.editing.images import grey_out
from pbe.errors import UserError
from pbe.evaluation.ablation.config import BY_ROW
from pbe.evaluation.ablation.measuring import read_edits
from pbe.evaluation.ablation.plan import PICTURES
from pbe.evaluation.ablation.results import Results
from pbe.evaluation.ablation.stages import Stage
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.metrics.bootstrap import Estimate
from pbe.evaluation.report.sheets import sheet


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
        across = _place(place) if by_row else results.estimates[row.name, options.plot_x]
        points.append((across.value, up.value))
        axes.errorbar(
            across.value, up.value, xerr=None if by_row else _bars(across), yerr=_bars(up), fmt="o",
            color=f"C{place % 10}", capsize=3, zorder=3,
        )  # fmt: skip
        seeds = results.scores[row.name, options.plot_y]
        beside = [place] * len(seeds) if by_row else _values(results, row.name, options.plot_x)
        axes.scatter(beside, [one.value for one in seeds], s=12, color=f"C{place % 10}", alpha=0.4)
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


def _place(number: int) -> Estimate:
    return Estimate(float(number), float(number), float(number))


def _values(results: Results, row: str, metric: str) -> list[float]:
    return [one.value for one in results.scores[row, metric]]


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
