"""Line charts as inline SVG: they take their colours from the page, so they follow its light or dark look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from pbe.errors import UserError

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 44
TICKS = 5


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: shown in the legend.
        points: (x, y), x ascending.
        style: CSS class: ``raw`` (faint), ``main`` or ``second``.
        marks: draw a dot at every point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "main"
    marks: bool = False


def smooth(points: Sequence[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """Return the running mean over a window of ``share`` of the points, shorter at the start."""
    window = max(1, round(share * len(points)))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    return [
        (x, (sums[i + 1] - sums[max(0, i + 1 - window)]) / (i + 1 - max(0, i + 1 - window)))
        for i, (x, _) in enumerate(points)
    ]


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Return about ``count`` round numbers, 1, 2 or 5 powers of ten apart, from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> str:
    """Draw a chart as an ``<svg>`` element; all texts are escaped.

    Raises:
        UserError: there is no point, or one that is not finite.
    """
    points = [point for line in lines for point in line.points]
    if not points or not all(math.isfinite(value) for point in points for value in point):
        raise UserError(f"chart '{title}': there are no points, or some are not finite numbers")
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(0.0, min(y for _, y in points)), max(y for _, y in points)
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / y_span * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_attribute(title)}">'
    ]
    for value in ticks(y_low, y_high):
        y = place(x_low, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(x_low, x_high):
        x = place(value, y_low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text x="2" y="14">{escape(y_label)}</text>')
    for line in lines:
        placed = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="{_attribute(line.style)}" points="{path}"/>')
        if line.marks:
            parts += [
                f'<circle class="{_attribute(line.style)}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
                for x, y in placed
            ]
    return "".join([*parts, "</svg>", _legend(lines)])


def _legend(lines: Sequence[Line]) -> str:
    items = (f'<span class="{_attribute(line.style)}">{escape(line.name)}</span>' for line in lines)
    return f'<p class="legend">{"".join(items)}</p>'


def _attribute(text: str) -> str:
    return escape(text, {'"': "&quot;"})
