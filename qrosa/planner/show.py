"""A plan for people and for programs: the JSON document, the table of phases, the verdict, the what-if rows.

The only file of the planner that knows ``rich`` and the document's keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qrosa.planner.bytes.inference import verify_bytes
from qrosa.planner.bytes.phases import traffic
from qrosa.planner.plan import Plan
from qrosa.planner.reasons import reasons
from qrosa.planner.search.alternatives import alternatives
from qrosa.planner.search.whatif import WhatIf, what_if
from qrosa.planner.time.run_time import duration, run_time
from qrosa.planner.workload import Workload
from qrosa.quantities import bytes_text

if TYPE_CHECKING:
    from rich.table import Table


def document(plan: Plan) -> dict[str, Any]:
    """The document that ``qrosa plan --json`` prints and a run keeps as ``plan.json``."""
    estimated, run = plan.estimate(), run_time(plan)
    return {
        "model": plan.request.shape.source,
        "base": {
            "parameters": plan.request.shape.base_parameters,
            "kind": plan.request.shape.kind,
            "read_from": plan.request.shape.read_from,
            "family": plan.request.shape.dims.family,
            "known": plan.request.shape.dims.known,
            "notes": list(plan.request.shape.all_notes),
        },
        "budget": {
            "trainable": plan.allocation.trainable,
            "share": plan.allocation.share,
            "rank": plan.allocation.rank,
            "density": plan.allocation.density,
            "nnz": plan.allocation.nnz_total,
            "low_rank_parameters": plan.allocation.low_rank_parameters,
            "where": plan.where,
        },
        "settings": plan.settings,
        "reasons": reasons(plan),
        "phases": {
            name: {
                "device": {**memory.device, "total": memory.device_total},
                "host": {**memory.host, "total": memory.host_total},
                "disk": memory.disk,
                "moment": memory.moment,
            }
            for name, memory in plan.phases.items()
        },
        "verify": verify_bytes(plan.work),
        "traffic": traffic(plan.work),
        "traffic_per_step": plan.traffic,
        "peak": plan.peak,
        "vram": plan.request.cap,
        "host_peak": plan.host_peak,
        "host_memory": plan.request.host_cap,
        "fits": plan.fits,
        "nearest": [{"setting": way.setting, "value": way.value, "peak": way.peak} for way in alternatives(plan)],
        "estimate": estimated.to_json() | {"run": run.to_json() if run else None} if estimated else None,
        "what_if": [row.to_json() for row in what_if(plan)],
    }


def memory_table(plan: Plan) -> Table:
    """Phase by component, in MiB, for a terminal."""
    from rich.table import Table

    table = Table(title=f"Memory in MiB, on {_device_words(plan.work)}", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in plan.phases:
        table.add_column(name, justify="right")
    columns = list(plan.phases.values())
    for component in dict.fromkeys(key for memory in columns for key in memory.device):
        table.add_row(component.replace("_", " "), *(_mebibytes(m.device.get(component)) for m in columns))
    table.add_section()
    table.add_row("device", *(_mebibytes(m.device_total) for m in columns), style="bold")
    for component in dict.fromkeys(key for memory in columns for key in memory.host):
        name = f"host: {component.replace('_', ' ')}"
        table.add_row(name, *(_mebibytes(m.host.get(component)) for m in columns), style="dim")
    table.add_row("host", *(_mebibytes(m.host_total) for m in columns), style="bold")
    table.add_section()
    table.add_row("disk", *(_mebibytes(m.disk) for m in columns))
    return table


def verdict(plan: Plan) -> str:
    """One line: fits or not, in what, and where the peak is."""
    phase, peak, cap, what = plan.tightest
    word = "fits" if plan.fits else "does not fit"
    moment = plan.phases[phase].moment
    return f"{word}: {bytes_text(peak)} of {bytes_text(cap)} {what}, at {phase} ({moment})"


def what_if_table(plan: Plan, rows: list[WhatIf]) -> Table:
    """The rows for a terminal."""
    from rich.table import Table

    title = f"What if, in {bytes_text(plan.request.cap)} with rows of {plan.work.length} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("levers", no_wrap=True)
    for name in ("longest seq-len", "micro-batch", "least memory", "host"):
        table.add_column(name, justify="right")
    timed = plan.request.machines is not None
    run = run_time(plan)
    if timed:
        table.add_column("est. tokens/s", justify="right")
    if run:
        table.add_column("est. training", justify="right")
    for row in rows:
        found = [row.longest_seq_len, row.largest_micro_batch]
        cells = [f"{number:,}" if number else "-" for number in found]
        cells += [bytes_text(row.smallest_card), bytes_text(row.host)]
        if timed:
            cells.append(f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "-")
        if run:
            cells.append(duration(run.tokens / row.tokens_per_s) if row.tokens_per_s else "-")
        table.add_row(row.words + (" (plan)" if row.planned else ""), *cells, style="bold" if row.planned else None)
    return table


def _device_words(work: Workload) -> str:
    return "the CPU" if work.on_cpu else "the card"


def _mebibytes(size: int | None) -> str:
    return "" if not size else f"{size / 2**20:,.1f}"
