"""Charts of amounts as inline SVG: pairs of bars, and heat maps of modules by layer."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from qrosa.report.charts import WIDTH, Format, Series, legend, svg


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
    shown = [Series(name, [], number + 1) for number, name in enumerate(names)]
    return legend(shown) + svg(WIDTH, len(rows) * step + 6, "".join(parts))


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
    cell = max(6.0, (WIDTH - left) / len(layers))
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
    return scale + svg(
        max(WIDTH, math.ceil(left + cell * len(layers))), math.ceil(len(kinds) * height) + 18, "".join(parts)
    )
