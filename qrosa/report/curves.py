"""The curves of a run's logs: (step, value) pairs, as they are and as means of the last steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qrosa.report.charts import Point

_MOST_SMOOTHED = 50


def steps_of(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of optimizer steps; that of the mask selection is none."""
    return [line for line in metrics if line.get("phase") != "select"]


def points(lines: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """A figure of a log over the steps; lines without a finite number there are left out."""
    found = [(line["step"], number(line.get(key))) for line in lines]
    return [(step, value) for step, value in found if value is not None]


def number(value: object) -> float | None:
    """A finite number, or None for anything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def window_of(steps: int) -> int:
    """Steps that a smoothed value is the mean of: a tenth of all, at most 50."""
    return min(_MOST_SMOOTHED, max(1, steps // 10))


def smooth(curve: Sequence[Point], window: int) -> list[Point]:
    """At each point the mean of the last ``window`` values, of fewer at the beginning."""
    last = [curve[max(0, index + 1 - window) : index + 1] for index in range(len(curve))]
    return [(run[-1][0], math.fsum(y for _, y in run) / len(run)) for run in last]
