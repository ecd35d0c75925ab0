"""The page of ``qrosa compare``: the table of what differs, and the curves of all runs in one chart each."""

from __future__ import annotations

from collections.abc import Callable

from qrosa.quantities import bytes_text
from qrosa.report.charts import Format, Point, Series, line_chart, two_scales
from qrosa.report.compare import Comparison
from qrosa.report.curves import points
from qrosa.report.runs import RunFigures
from qrosa.report.sheet import sheet, table
from qrosa.report.words import count_text, loss_form

MARK = "<main><h1>qrosa compare: "
"""Tells such a page from any other file."""


def page(comparison: Comparison) -> str:
    """A self-contained page, for light and dark screens, without a script."""
    rows = [*comparison.rows(), *comparison.setting_rows()]
    notes = "".join(table([(note,)]) for note in comparison.notes)
    before = f'<section class="wide"><h2>What differs</h2>{notes}{table(rows, ("", *comparison.names))}</section>'
    return sheet(f"qrosa compare: {', '.join(comparison.names)}", [], _charts(comparison), {}, before=before)


def _charts(comparison: Comparison) -> list[tuple[str, str]]:
    over = f", mean of {comparison.window} steps" if comparison.window > 1 else ""

    def smoothed(key: str) -> list[Series]:
        return _series(comparison, lambda run: comparison.smoothed(run, key))

    held_out = _series(comparison, lambda run: points(run.evaluations, "loss"), marks=True)
    return [
        (f"Training loss{over}", two_scales("training", smoothed("loss"), form=loss_form)),
        ("Held-out loss", two_scales("heldout", held_out, form=loss_form)),
        (f"Tokens per second{over}", _amounts(smoothed("tokens_per_s"), count_text)),
        (
            "Memory, highest so far in the phase",
            _amounts(_series(comparison, lambda run: points(run.steps, "memory")), lambda v: bytes_text(int(v))),
        ),
        (f"Gradient norm, before clipping{over}", _amounts(smoothed("grad_norm"), lambda v: f"{v:.3g}")),
        (
            "Learning rate of the low-rank part",
            _amounts(_series(comparison, lambda run: points(run.steps, "lr")), lambda v: f"{v:.2g}"),
        ),
    ]


def _series(comparison: Comparison, curve: Callable[[RunFigures], list[Point]], *, marks: bool = False) -> list[Series]:
    named = zip(comparison.names, comparison.runs, strict=True)
    return [Series(name, curve(run), colour, marks) for colour, (name, run) in enumerate(named, 1)]


def _amounts(series: list[Series], form: Format) -> str:
    return line_chart(series, form=form, from_zero=True)
