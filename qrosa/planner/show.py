"""TODO-DOC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qrosa.planner.plan import Plan
from qrosa.planner.search.whatif import WhatIf
from qrosa.quantities import size_text

if TYPE_CHECKING:
    from rich.table import Table


def what_if_table(plan: Plan, rows: list[WhatIf]) -> Table:
    """The rows for a terminal."""
    from rich.table import Table

    title = f"What if, in {size_text(plan.request.cap)} with rows of {plan.work.length} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("levers", no_wrap=True)
    for name in ("longest seq-len", "micro-batch", "least memory", "host"):
        table.add_column(name, justify="right")
    timed = plan.request.machines is not None
    if timed:
        table.add_column("est. tokens/s", justify="right")
    for row in rows:
        found = [row.longest_seq_len, row.largest_micro_batch]
        cells = [f"{number:,}" if number else "-" for number in found]
        cells += [size_text(row.smallest_card), size_text(row.host)]
        if timed:
            cells.append(f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "-")
        table.add_row(row.words + (" (plan)" if row.planned else ""), *cells, style="bold" if row.planned else None)
    return table
