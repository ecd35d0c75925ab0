"""Charts as inline SVG: lines, pairs of bars and heat maps, with nothing to load and no script to run.

Colours are CSS variables of the page around them, so that one drawing serves a light and a dark screen. A pointer
over a mark shows its value (the SVG ``title`` element).
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 30
_MOST_POINTS = 500

Point = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: As the legend has it.
        points: (x, y), rising in x.
        colour: Number of the page's series colour, from 1.
        marks: Draw a dot at each point, for lines of few points.
    """

    name: str
    points: Sequence[Point]
    colour: int = 1
    marks: bool = False


def line_chart(series: Sequence[Series], *, form: Format, from_zero: bool = False) -> str:
    """Lines over the steps.

    Args:
        series: At least one with a point; those without any are left out.
        form: How a y value is written.
        from_zero: Begin the y axis at 0, for amounts.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return '<p class="empty">Nothing was recorded.</p>'
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    ticks = nice_ticks(0.0 if from_zero else min(ys), max(ys))
    x0, x1, y0, y1 = min(xs), max(xs), ticks[0], ticks[-1]

    def place(x: float, y: float) -> Point:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [_grid_line(place(x0, tick)[1], form(tick)) for tick in ticks]
    parts += [_x_label(place(x, y0)[0], f"{x:g}") for x in _x_ticks(x0, x1)]
    parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 2}" text-anchor="end">step</text>')
    parts += [_line(s, place, form) for s in drawn]
    return _legend(drawn) + _svg(WIDTH, HEIGHT, "".join(parts))


def _line(series: Series, place: Callable[[float, float], Point], form: Format) -> str:
    points = thin_out(series.points)
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    line = f'<polyline class="line s{series.colour}" points="{where}"/>'
    radius = 3.5 if series.marks or len(points) == 1 else 6
    dot = "dot" if series.marks or len(points) == 1 else "hover"
    for x, y in points:
        at = place(x, y)
        label = html.escape(f"{series.name}, step {x:g}: {form(y)}")
        line += (
            f'<circle class="{dot} s{series.colour}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius}">'
            f"<title>{label}</title></circle>"
        )
    return line


def bar_pairs(rows: Sequence[tuple[str, float | None, float | None]], names: tuple[str, str], form: Format) -> str:
    """Two horizontal bars a row, such as planned and measured; a missing value is left out.

    Args:
        rows: (label, first value, second value).
        names: What the two values are.
        form: How a value is written.
    """
    most = max((v for _, *values in rows for v in values if v is not None), default=0.0)
    if most <= 0:
        return '<p class="empty">Nothing was recorded.</p>'
    step, left = 46, 64
    parts = []
    for index, (label, *values) in enumerate(rows):
        top = index * step + 6
        parts.append(
            f'<text class="label" x="{left - 10}" y="{top + 21}" text-anchor="end">{html.escape(label)}</text>'
        )
        for number, (name, value) in enumerate(zip(names, values, strict=True)):
            if value is None:
                continue
            width, y = max(1.0, value / most * (WIDTH - left - 96)), top + number * 17
            tip = html.escape(f"{label}, {name}: {form(value)}")
            parts.append(
                f'<rect class="bar s{number + 1}" x="{left}" y="{y}" width="{width:.1f}" height="15" rx="3">'
                f"<title>{tip}</title></rect>"
                f'<text class="value" x="{left + width + 6:.1f}" y="{y + 12}">{html.escape(form(value))}</text>'
            )
    legend = [Series(name, [], number + 1) for number, name in enumerate(names)]
    return _legend(legend) + _svg(WIDTH, len(rows) * step + 6, "".join(parts))


def heat_map(values: Mapping[tuple[str, int], float], *, form: Format) -> str:
    """Module types down, decoder layers across, the depth of one colour for the value.

    Args:
        values: (module type, layer) -> value, at least 0.
        form: How a value is written.
    """
    most = max(values.values(), default=0.0)
    if most <= 0:
        return '<p class="empty">There is none.</p>'
    kinds = list(dict.fromkeys(kind for kind, _ in values))
    layers = sorted({layer for _, layer in values})
    left = 10 + 7 * max(len(kind) for kind in kinds)
    cell = max(6.0, min(26.0, (WIDTH - left) / len(layers)))
    height = 22.0
    parts = []
    for row, kind in enumerate(kinds):
        y = row * height
        parts.append(f'<text class="label" x="{left - 8}" y="{y + 15}" text-anchor="end">{html.escape(kind)}</text>')
        for column, layer in enumerate(layers):
            value = values.get((kind, layer))
            if value is None:
                continue
            tip = html.escape(f"layer {layer}, {kind}: {form(value)}")
            parts.append(
                f'<rect class="cell" x="{left + column * cell:.1f}" y="{y}" width="{cell - 1.5:.1f}" '
                f'height="{height - 1.5}" rx="2" style="--depth:{value / most:.3f}"><title>{tip}</title></rect>'
            )
    every = math.ceil(28 / cell)
    for column, layer in enumerate(layers):
        if column % every == 0:
            x, y = left + (column + 0.5) * cell, len(kinds) * height + 13
            parts.append(f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{layer}</text>')
    scale = (
        '<p class="scale"><span>0</span><span class="ramp"></span>'
        f"<span>{html.escape(form(most))}</span><span>across: decoder layer</span></p>"
    )
    return scale + _svg(
        max(WIDTH, math.ceil(left + cell * len(layers))), math.ceil(len(kinds) * height) + 18, "".join(parts)
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values, evenly spaced, that enclose [low, high]."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low if low == 0 else low - pad), high + pad
    raw = (high - low) / (count - 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def thin_out(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most ``most`` points: means of equal runs, so that noise is not mistaken for its extremes."""
    if len(points) <= most:
        return list(points)
    edges = [round(index * len(points) / most) for index in range(most + 1)]
    runs = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def _x_ticks(low: float, high: float) -> list[float]:
    inner = [tick for tick in nice_ticks(low, high, 7) if low <= tick <= high and tick == int(tick)]
    return inner or [low]


def _grid_line(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{html.escape(label)}</text>'
    )


def _x_label(x: float, label: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{label}</text>'


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    items = "".join(f'<span><i class="key s{s.colour}"></i>{html.escape(s.name)}</span>' for s in series)
    return f'<p class="legend">{items}</p>'


def _svg(width: float, height: float, body: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{body}</svg>'
