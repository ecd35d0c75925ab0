"""``report.html``: a run's curves on one self-contained page, for light and dark screens."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qrosa.optim.schedule import learning_rate_factor, sparse_learning_rate_factor
from qrosa.quantities import bytes_text
from qrosa.report.charts import Series, bar_pairs, heat_map, line_chart
from qrosa.report.facts import Facts, ModuleShare
from qrosa.report.words import beside_loss

_PHASE_ORDER = ("quantise", "load", "select", "train", "eval", "save", "export")


def page(
    facts: Facts, report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]
) -> str:
    """``report.html``: self-contained, for light and dark screens."""
    steps = [line for line in metrics if line["phase"] != "select"]
    held_out = [(line["step"], line["loss"]) for line in evals]
    charts = [
        ("Loss", line_chart(
            [Series("training", _points(steps, "loss"), 1), Series("held-out rows", held_out, 2, marks=True)],
            form=lambda v: f"{v:.4g}",
        )),
        ("Learning rates", _learning_rates(facts)),
        ("Tokens per second", line_chart(
            [Series("speed", _points(steps, "tokens_per_s"))], form=_count, from_zero=True
        )),
        ("Memory: planned and measured peak of each phase", _memory(facts)),
        ("Gradient norm, before clipping", line_chart(
            [Series("norm", _points(steps, "grad_norm"))], form=lambda v: f"{v:.3g}", from_zero=True
        )),
        ("Where the sparse delta sits: share of the weights", _heat(
            facts, lambda m: m.nnz / m.size, lambda v: f"{v:.3%}"
        )),
        ("How large it is: root mean square of its values", _heat(facts, lambda m: m.delta_rms, lambda v: f"{v:.2e}")),
        ("Ranks of the low-rank part", _heat(facts, lambda m: float(m.rank), lambda v: f"{v:g}")),
    ]  # fmt: skip
    title = f"qrosa run: {Path(str(facts.settings['output'])).name}"
    return sheet(title, _tiles(facts, report), charts, facts.settings, _data(facts))


def sheet(
    title: str,
    tiles: Sequence[tuple[str, str]],
    charts: Sequence[tuple[str, str]],
    settings: Mapping[str, Any],
    between: str = "",
) -> str:
    """A self-contained page.

    Args:
        title: Its heading.
        tiles: (what, figure) on top.
        charts: (heading, SVG or HTML).
        settings: In a table at the end.
        between: HTML before that table.
    """
    body = "".join(f"<section><h2>{html.escape(heading)}</h2>{chart}</section>" for heading, chart in charts)
    figures = "".join(f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in tiles)
    rows = "".join(
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(_setting(value))}</td></tr>"
        for key, value in settings.items()
    )
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f'<body><main><h1>{title}</h1><div class="tiles">{figures}</div><div class="charts">{body}</div>'
        f"{between}<details><summary>Settings</summary><table>{rows}</table></details></main></body></html>\n"
    )


def _data(facts: Facts) -> str:
    """What is not used as it stands in the data, with the first place of each."""
    lines = "".join(
        f"<tr><th>{html.escape(note['what'])}</th><td>{note['count']:,} {html.escape(note['unit'])}</td>"
        f"<td>{html.escape(note['why'])}</td><td>{html.escape(note['first'])}</td></tr>"
        for note in facts.data.get("unused", ())
    )
    if not lines:
        return ""
    return f'<section class="data"><h2>Data that is not used as it stands</h2><table>{lines}</table></section>'


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _learning_rates(facts: Facts) -> str:
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
    return line_chart(series, form=lambda v: f"{v:.2g}", from_zero=True)


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
        ("steps", f"{report['steps']}"),
        ("time in steps", _duration(report["seconds"])),
        ("tokens a second", _count(report["tokens_per_s"])),
    ]
    if report["eval"]:
        tiles.insert(1, ("held-out loss", f"{report['eval']['loss']:.4f} ({beside_loss(report['eval'])})"))
    if report["micro_batch_changes"]:
        tiles.append(("micro-batch halved", f"{len(report['micro_batch_changes'])} times"))
    return tiles


def loss_text(value: float | None) -> str:
    """A loss, or that there is none."""
    return "none" if value is None else f"{value:.4f}"


def _setting(value: object) -> str:
    return "not set" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1c1d1f; --soft: #63666c; --line: #e3e4e6;
  --s1: #2a6fdb; --s2: #d9731a }
@media (prefers-color-scheme:dark) { :root { --page: #141517; --card: #1d1f22; --ink: #ececee; --soft: #a0a4ab;
  --line: #33363b; --s1: #6aa5ff; --s2: #f2a154 } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1360px; margin: 0 auto; padding: 24px 16px }
h1 { font-size: 22px; margin: 0 0 16px }
h2 { font-size: 15px; margin: 0 0 8px }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 16px }
.tiles div, section, details { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 16px }
.tiles b { display: block; font-size: 18px; font-variant-numeric: tabular-nums }
.tiles span { color: var(--soft); font-size: 13px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); gap: 16px;
  margin-bottom: 16px }
svg { display: block; width: 100%; height: auto }
svg text { font-size: 12px; fill: var(--soft) }
svg .label, svg .value { fill: var(--ink) }
.grid { stroke: var(--line) }
.s1 { fill: var(--s1) }
.s2 { fill: var(--s2) }
.line { stroke-width: 1.8; stroke-linejoin: round }
.line.s1 { stroke: var(--s1); fill: none }
.line.s2 { stroke: var(--s2); fill: none }
.hover.s1, .hover.s2 { fill: transparent }
.cell { fill: var(--s1); fill-opacity: calc(.06 + .94 * var(--depth)) }
.legend, .scale { display: flex; gap: 14px; margin: 0 0 6px; color: var(--soft); font-size: 13px; align-items: center }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px }
.key.s1 { background: var(--s1) }
.key.s2 { background: var(--s2) }
.ramp { width: 120px; height: 10px; border-radius: 3px; border: 1px solid var(--line);
  background: linear-gradient(90deg, transparent, var(--s1)) }
.empty { color: var(--soft) }
.data { margin-bottom: 16px; overflow-x: auto }
table { border-collapse: collapse; margin-top: 8px }
th, td { text-align: left; padding: 2px 16px 2px 0; font-weight: 400 }
th { color: var(--soft) }
"""
