"""Lines over the steps as inline SVG, with nothing to load and no script to run; what other charts share.

Colours are CSS variables of the page around them, so that one drawing serves a light and a dark screen. A pointer
over a mark shows its value (the SVG ``title`` element).
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qrosa.report.sheet import COLOURS, choice

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
        colour: Number of the page's series colour, from 1; beyond the last one they begin again, dashed.
        marks: Draw a dot at each point, for lines of few points.
        faint: Draw it behind the others, such as what another line is the mean of.
    """

    name: str
    points: Sequence[Point]
    colour: int = 1
    marks: bool = False
    faint: bool = False

    @property
    def style(self) -> str:
        """Its classes in the page's style sheet."""
        again, colour = divmod(self.colour - 1, COLOURS)
        return f"s{colour + 1}{' dashed' if again else ''}{' faint' if self.faint else ''}"


@dataclass(frozen=True)
class Event:
    """Something that happened after a step: an upright line across a chart.

    Attributes:
        step: Steps that were done.
        name: What it was.
    """

    step: float
    name: str


def line_chart(
    series: Sequence[Series],
    *,
    form: Format,
    from_zero: bool = False,
    logarithmic: bool = False,
    events: Sequence[Event] = (),
) -> str:
    """Lines over the steps.

    Args:
        series: At least one with a point; those without any are left out.
        form: How a y value is written.
        from_zero: Begin the y axis at 0, for amounts.
        logarithmic: Equal heights are equal ratios; values that are not above 0 are left out.
        events: What happened meanwhile; those beyond the lines are left out.
    """
    drawn = [s for s in (_above_zero(s) if logarithmic else s for s in series) if s.points]
    if not drawn:
        return '<p class="empty">Nothing was recorded.</p>'
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    ticks = log_ticks(min(ys), max(ys)) if logarithmic else nice_ticks(0.0 if from_zero else min(ys), max(ys))
    height = math.log10 if logarithmic else float
    x0, x1, y0, y1 = min(xs), max(xs), height(ticks[0]), height(ticks[-1])

    def place(x: float, y: float) -> Point:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (height(y) - y0) / (y1 - y0)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [_grid_line(place(x0, tick)[1], form(tick)) for tick in ticks]
    parts += [_x_label(place(x, ticks[0])[0], f"{x:g}") for x in _x_ticks(x0, x1)]
    parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 2}" text-anchor="end">step</text>')
    within = [event for event in events if x0 <= event.step <= x1]
    parts += [_event(event, place(event.step, ticks[0])[0], line) for line, event in enumerate(within)]
    parts += [_line(s, place, form) for s in sorted(drawn, key=lambda s: not s.faint)]
    return legend(drawn) + svg(WIDTH, HEIGHT, "".join(parts))


def two_scales(name: str, series: Sequence[Series], *, form: Format, events: Sequence[Event] = ()) -> str:
    """The same lines on a linear and on a logarithmic scale, of which the page shows the one that is chosen.

    Args:
        name: Tells this chart from the others of the page.
        series: The lines.
        form: How a y value is written.
        events: What happened meanwhile.
    """
    return choice(
        name,
        [
            ("linear", line_chart(series, form=form, events=events)),
            ("logarithmic", line_chart(series, form=form, logarithmic=True, events=events)),
        ],
    )


def _above_zero(series: Series) -> Series:
    points = [(x, y) for x, y in series.points if y > 0]
    return Series(series.name, points, series.colour, series.marks, series.faint)


def _line(series: Series, place: Callable[[float, float], Point], form: Format) -> str:
    points = thin_out(series.points)
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    line = f'<polyline class="line {series.style}" points="{where}"/>'
    if series.faint:
        return line
    radius = 3.5 if series.marks or len(points) == 1 else 6
    dot = "dot" if series.marks or len(points) == 1 else "hover"
    for x, y in points:
        at = place(x, y)
        label = html.escape(f"{series.name}, step {x:g}: {form(y)}")
        line += (
            f'<circle class="{dot} {series.style}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius}">'
            f"<title>{label}</title></circle>"
        )
    return line


def _event(event: Event, x: float, line: int) -> str:
    """An upright line; names of neighbours stand in ``line``s of their own."""
    end, y = HEIGHT - _BOTTOM, _TOP + 9 + 13 * (line % 4)
    anchor, beside = ("end", x - 4) if x > WIDTH / 2 else ("start", x + 4)
    return (
        f'<line class="event" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{end}"/>'
        f'<text class="tick" x="{beside:.1f}" y="{y}" text-anchor="{anchor}">{html.escape(event.name)}</text>'
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


def log_ticks(low: float, high: float) -> list[float]:
    """Round values above 0 that enclose [low, high]: of each decade 1, 2 and 5, or 1 alone where decades are many.

    Within less than a decade they are evenly spaced values, as far as these stay above 0.
    """
    even = nice_ticks(low, high)
    if high < 10 * low and even[0] > 0:
        return even
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    every = max(1, (last - first) // 7)
    powers = range(first, last + every, every)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    below, above = [tick for tick in ticks if tick <= low], [tick for tick in ticks if tick >= high]
    return [tick for tick in ticks if below[-1] <= tick <= above[0]]


def thin_out(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most ``most`` points: means of equal runs, so that noise is not mistaken for its extremes."""
    if len(points) <= most:
        return list(points)
    edges = [round(index * len(points) / most) for index in range(most + 1)]
    runs = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def legend(series: Sequence[Series]) -> str:
    """What the colours stand for, where there is more than one."""
    if len(series) < 2:
        return ""
    items = "".join(f'<span><i class="key {s.style}"></i>{html.escape(s.name)}</span>' for s in series)
    return f'<p class="legend">{items}</p>'


def svg(width: float, height: float, body: str) -> str:
    """A drawing as wide as its place on the page."""
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{body}</svg>'


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
