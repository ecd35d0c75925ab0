"""The page that every report is written on: self-contained HTML for light and dark screens, without a script.

Where something can be seen in two ways (a linear or a logarithmic scale) both stand in the page, and radio buttons and
a style sheet choose which of them shows.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

COLOURS = 8  # of series; further ones begin again, dashed


def sheet(
    title: str,
    tiles: Sequence[tuple[str, str]],
    charts: Sequence[tuple[str, str]],
    settings: Mapping[str, object],
    *,
    before: str = "",
    between: str = "",
) -> str:
    """A self-contained page.

    Args:
        title: Its heading.
        tiles: (what, figure) on top.
        charts: (heading, SVG or HTML).
        settings: In a table at the end; empty for none.
        before: HTML before the charts.
        between: HTML before the settings.
    """
    body = "".join(f"<section><h2>{html.escape(heading)}</h2>{chart}</section>" for heading, chart in charts)
    figures = "".join(f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in tiles)
    top = f'<div class="tiles">{figures}</div>' if figures else ""
    rows = [(key, setting_text(value)) for key, value in settings.items()]
    end = folded("Settings", table(rows)) if rows else ""
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_COLOURS}{_STYLE}</style></head>'
        f'<body><main><h1>{title}</h1>{top}{before}<div class="charts">{body}</div>{between}{end}</main></body>'
        "</html>\n"
    )


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Plain texts as a table whose first column names what stands in the others.

    Args:
        rows: A text for each column.
        head: Headings of the columns, or none.
    """
    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    lines = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(text)}</td>' for text in texts)}</tr>"
        for name, *texts in rows
    )
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if top else ''}{lines}</table>"


def folded(heading: str, content: str) -> str:
    """HTML that shows when its heading is clicked on."""
    return f"<details><summary>{html.escape(heading)}</summary>{content}</details>"


def choice(name: str, views: Sequence[tuple[str, str]]) -> str:
    """Several views of one thing, the first of them shown until another is chosen.

    Args:
        name: Tells this choice from the others of the page.
        views: (label, HTML), two of them.
    """
    buttons = "".join(
        f'<input type="radio" name="{name}" id="{name}-{index}"{" checked" if index == 0 else ""}>'
        f'<label for="{name}-{index}">{html.escape(label)}</label>'
        for index, (label, _) in enumerate(views)
    )
    return f'<div class="choice">{buttons}{"".join(f"<div>{view}</div>" for _, view in views)}</div>'


def setting_text(value: object) -> str:
    """A setting's value in words."""
    return "not set" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


_LIGHT = ("#2a6fdb", "#d9731a", "#2c8a4b", "#c2376b", "#7a4fd0", "#0f8b8d", "#8a6d1d", "#6b7079")
_DARK = ("#6aa5ff", "#f2a154", "#63c584", "#f07aa5", "#b596ff", "#4cc9cb", "#d3b45a", "#a7acb5")


def _variables(colours: Sequence[str]) -> str:
    return "; ".join(f"--s{number}: {colour}" for number, colour in enumerate(colours, 1))


def _series_style(number: int) -> str:
    """What a series of this colour looks like as an area, a line, a point to hover over, and in a legend."""
    own = f"var(--s{number})"
    return (
        f".s{number} {{ fill: {own} }}\n.line.s{number} {{ stroke: {own}; fill: none }}\n"
        f".hover.s{number} {{ fill: transparent }}\n.key.s{number} {{ background: {own} }}\n"
    )


_COLOURS = f"""
:root {{ color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1c1d1f; --soft: #63666c; --line: #e3e4e6;
  {_variables(_LIGHT)} }}
@media (prefers-color-scheme:dark) {{ :root {{ --page: #141517; --card: #1d1f22; --ink: #ececee; --soft: #a0a4ab;
  --line: #33363b; {_variables(_DARK)} }} }}
{"".join(map(_series_style, range(1, COLOURS + 1)))}"""
_STYLE = """
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
.event { stroke: var(--soft); stroke-dasharray: 2 3 }
.line { stroke-width: 1.8; stroke-linejoin: round }
.line.faint { stroke-width: 1; stroke-opacity: .4 }
.line.dashed { stroke-dasharray: 6 4 }
.cell { fill: var(--s1); fill-opacity: calc(.06 + .94 * var(--depth)) }
.legend, .scale { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0 0 6px; color: var(--soft); font-size: 13px;
  align-items: center }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px }
.key.faint { opacity: .4 }
.ramp { width: 120px; height: 10px; border-radius: 3px; border: 1px solid var(--line);
  background: linear-gradient(90deg, transparent, var(--s1)) }
.choice input { position: absolute; opacity: 0 }
.choice label { display: inline-block; margin: 0 4px 6px 0; padding: 0 8px; border: 1px solid var(--line);
  border-radius: 6px; color: var(--soft); font-size: 13px; cursor: pointer }
.choice input:checked + label { color: var(--ink); border-color: var(--soft) }
.choice input:focus-visible + label { outline: 2px solid var(--s1) }
.choice > div { display: none }
.choice input:nth-of-type(1):checked ~ div:nth-of-type(1), .choice input:nth-of-type(2):checked ~ div:nth-of-type(2) {
  display: block }
.empty { color: var(--soft) }
details { margin-bottom: 16px }
.wide { margin-bottom: 16px; overflow-x: auto }
.samples th, .samples td { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 420px; padding-bottom: 10px }
table { border-collapse: collapse; margin-top: 8px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 2px 16px 2px 0; font-weight: 400; vertical-align: top }
th { color: var(--soft) }
thead th { color: var(--ink); font-weight: 600 }
"""
