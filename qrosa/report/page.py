"""``report.html``: a run's curves on one self-contained page, for light and dark screens."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qrosa.optim.schedule import learning_rate_factor, sparse_learning_rate_factor
from qrosa.quantities import bytes_text
from qrosa.report.bars import bar_pairs, heat_map
from qrosa.report.charts import Event, Series, line_chart, two_scales
from qrosa.report.curves import points, smooth, steps_of, window_of
from qrosa.report.facts import Facts, ModuleShare
from qrosa.report.sheet import folded, sheet, table
from qrosa.report.words import beside_loss, count_text, duration_text, loss_form, loss_text

_PHASE_ORDER = ("quantise", "load", "select", "train", "eval", "save", "export")


def page(
    facts: Facts, report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]
) -> str:
    """``report.html``: self-contained, for light and dark screens."""
    steps, events = steps_of(metrics), _events(facts, report)
    charts = [
        ("Loss", _loss(steps, evals, events)),
        ("Learning rates", _learning_rates(facts, events)),
        ("Tokens per second", line_chart(
            [Series("speed", points(steps, "tokens_per_s"))], form=count_text, from_zero=True, events=events
        )),
        ("Memory: planned and measured peak of each phase", _memory(facts)),
        ("Gradient norm, before clipping", line_chart(
            [Series("norm", points(steps, "grad_norm"))], form=lambda v: f"{v:.3g}", from_zero=True, events=events
        )),
        ("Where the sparse delta sits: share of the weights", _heat(
            facts, lambda m: m.nnz / m.size, lambda v: f"{v:.3%}"
        )),
        ("How large it is: root mean square of its values", _heat(facts, lambda m: m.delta_rms, lambda v: f"{v:.2e}")),
        ("Ranks of the low-rank part", _heat(facts, lambda m: float(m.rank), lambda v: f"{v:g}")),
    ]  # fmt: skip
    title = f"qrosa run: {Path(str(facts.settings['output'])).name}"
    between = _samples(facts) + _data(facts) + folded("Machine", table(facts.machine.items()))
    return sheet(title, _tiles(facts, report), charts, facts.settings, between=between)


def _events(facts: Facts, report: Mapping[str, Any]) -> list[Event]:
    """What stands across the curves: where masks were picked, where the run went on, what its adapter is of."""
    state, events = facts.state, []
    if state.selected_at:
        events.append(Event(state.selected_at, "warm-up ends, masks picked"))
    events += [Event(step, "resumed") for step in state.resumed_at]
    if report["adapter_step"] != report["steps"]:
        events.append(Event(report["adapter_step"], "best: the adapter"))
    return events


def _loss(steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]], events: Sequence[Event]) -> str:
    """Loss of the steps, its mean over some of them where they are many, and of the held-out rows."""
    trained, held_out, window = points(steps, "loss"), points(evals, "loss"), window_of(len(steps))
    smoothed = smooth(trained, window) if window > 1 else []
    series = [
        Series("training", trained, 1, faint=bool(smoothed)),
        Series(f"training, mean of {window} steps", smoothed, 1),
        Series("held-out rows", held_out, 2, marks=True),
    ]
    return two_scales("loss", series, form=loss_form, events=events)


def _samples(facts: Facts) -> str:
    """Prompts with the answers before and after training."""
    if not facts.samples:
        return ""
    keys = ("prompt", "wanted", "before", "after")
    rows = [tuple("not known" if sample[key] is None else str(sample[key]) for key in keys) for sample in facts.samples]
    head = ("held-out prompt", "wanted", "answered before training", "answered now")
    return f'<section class="wide samples"><h2>Samples</h2>{table(rows, head)}</section>'


def _data(facts: Facts) -> str:
    """What is not used as it stands in the data, with the first place of each."""
    lines = "".join(
        f"<tr><th>{html.escape(note['what'])}</th><td>{note['count']:,} {html.escape(note['unit'])}</td>"
        f"<td>{html.escape(note['why'])}</td><td>{html.escape(note['first'])}</td></tr>"
        for note in facts.data.get("unused", ())
    )
    if not lines:
        return ""
    return f'<section class="wide"><h2>Data that is not used as it stands</h2><table>{lines}</table></section>'


def _learning_rates(facts: Facts, events: Sequence[Event]) -> str:
    settings, total = facts.settings, facts.phases.total
    kind, ramp = settings["schedule"], settings["lr_warmup"]
    start = total if facts.state.selected_at is None else facts.state.selected_at
    low_rank = [(s + 1, settings["lr"] * learning_rate_factor(s, total, kind, ramp)) for s in range(total)]
    sparse = [
        (s + 1, settings["sparse_lr"] * sparse_learning_rate_factor(s, total, kind, ramp, start))
        for s in range(start, total)
    ]
    has_low_rank = any(m.rank for m in facts.modules)
    series = [Series("low-rank", low_rank if has_low_rank else [], 1), Series("sparse", sparse, 2)]
    return line_chart(series, form=lambda v: f"{v:.2g}", from_zero=True, events=events)


def _memory(facts: Facts) -> str:
    planned, measured = facts.planned, facts.state.peaks
    phases = [phase for phase in _PHASE_ORDER if phase in measured]
    rows = [(phase, planned.get(phase), measured.get(phase)) for phase in phases]
    return bar_pairs(rows, ("planned", "measured"), bytes_text)


def _heat(facts: Facts, value: Callable[[ModuleShare], float], form: Callable[[float], str]) -> str:
    return heat_map({(m.kind, m.layer): value(m) for m in facts.modules}, form=form)


def _tiles(facts: Facts, report: Mapping[str, Any]) -> list[tuple[str, str]]:
    tiles = [
        ("loss, first to last step", f"{loss_text(report['loss']['first'])} → {loss_text(report['loss']['last'])}"),
        ("trainable", f"{facts.trainable:,} ({report['share']:.2%})"),
        (
            "steps",
            f"{report['steps']} of {report['steps_planned']}" if report["stopped_early"] else f"{report['steps']}",
        ),
        ("time in steps", duration_text(report["seconds"])),
        ("tokens a second", count_text(report["tokens_per_s"])),
    ]
    if report["eval"]:
        tiles.insert(1, ("held-out loss", f"{report['eval']['loss']:.4f} ({beside_loss(report['eval'])})"))
    if report["adapter_step"] != report["steps"]:
        tiles.insert(2, ("step that the adapter is of", f"{report['adapter_step']}, the best"))
    if report["micro_batch_changes"]:
        tiles.append(("micro-batch halved", f"{len(report['micro_batch_changes'])} times"))
    return tiles
