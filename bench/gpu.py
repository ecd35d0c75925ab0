"""Every figure that needs a card, in parts of under ten minutes: ops, the layer, training steps, plans and streaming.

    python -m bench.gpu                          # all parts, one after the other
    python -m bench.gpu --part ops               # one; --list names them

Writes ``bench/results/<device>-<date>.json``, row by row. The exit code is 1 where a row failed. ``make gpu`` runs the
tests with a tiny model before this; ``python -m bench.gpu_kit`` packs all of it for a machine without a registry.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from bench import compare_plan, compare_qlora, gpu_ops
from bench.gpu_measure import Results, peaks, require_card

SMALL, LARGE = ("llama-3.1-8b", "mistral-nemo-12b"), ("qwen2.5-32b", "llama-3.1-70b")
Row = dict[str, Any]


def op_rows() -> Iterator[Row]:
    """All ops."""
    peak = peaks()
    yield {"op": "peaks", **peak}
    for measure in (gpu_ops.dequant_add_rows, gpu_ops.sddmm_rows, gpu_ops.dequant_spmm_rows, gpu_ops.score_rows):
        yield from measure(peak)


def layer_rows() -> Iterator[Row]:
    """The whole layer."""
    peak = peaks()
    yield {"op": "peaks", **peak}
    yield from gpu_ops.layer_rows(peak)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "ops": op_rows,
    "layer": layer_rows,
    **{f"steps-{model}": partial(compare_qlora.compare, model) for model in SMALL},
    **{f"plan-{model}": partial(compare_plan.compare, model) for model in (*SMALL, *LARGE)},
}


def run(part: str) -> int:
    """Measure a part; the number of rows that failed, a part that breaks off counted as one."""
    print(f"== {part}", flush=True)
    results = Results(part)
    try:
        for row in PARTS[part]():
            results.add(row)
    except Exception as error:
        traceback.print_exc()
        results.add({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})
    return results.failed


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print("\n".join(PARTS))
        return 0
    require_card()
    return 1 if sum(run(part) for part in ([chosen.part] if chosen.part else PARTS)) else 0


if __name__ == "__main__":
    sys.exit(main())
