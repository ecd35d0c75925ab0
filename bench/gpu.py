"""Every figure that needs a card, in parts of under ten minutes: ops, the layer, training steps, plans and streaming.

    python -m bench.gpu                          # all parts, one after the other
    python -m bench.gpu --part ops               # one; --list names them

Writes ``bench/results/<device>-<date>.json``, row by row. What fails is a row that says why, the rest goes on, and the
exit code is 1; each part is a process of its own, because one illegal access spoils a process for good, and is cut with
what it has when its time is up. ``make gpu`` runs the tests with a tiny model before this; ``python -m bench.gpu_kit``
packs all of it for a machine without a registry.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from bench import compare_plan, compare_qlora, gpu_ops
from bench.deadline import CutError, cut_after
from bench.gpu_measure import Measurement, Results, failure, peaks, require_card

SMALL, LARGE = ("llama-3.1-8b", "mistral-nemo-12b"), ("qwen2.5-32b", "llama-3.1-70b")
LIMIT, GRACE = 540, 30  # seconds of a part, and until a card that hangs is given up


def op_measurements() -> Iterator[Measurement]:
    """All ops."""
    peak = peaks()
    yield {"op": "peaks"}, lambda: [{"op": "peaks", **peak}]
    yield from gpu_ops.op_measurements(peak)


def layer_measurements() -> Iterator[Measurement]:
    """The whole layer."""
    peak = peaks()
    yield {"op": "peaks"}, lambda: [{"op": "peaks", **peak}]
    yield from gpu_ops.layer_measurements(peak)


PARTS: dict[str, Callable[[], Iterator[Measurement]]] = {
    "ops": op_measurements,
    "layer": layer_measurements,
    **{f"steps-{model}": partial(compare_qlora.compare, model) for model in SMALL},
    **{f"plan-{model}": partial(compare_plan.compare, model) for model in (*SMALL, *LARGE)},
}


def run(part: str) -> int:
    """Measure a part; the number of rows that failed, a part that breaks off or is cut counted as one."""
    print(f"== {part}", flush=True)
    results = Results(part)
    hung = f"the card did not answer for {GRACE} s after the part's {LIMIT} s"
    try:
        with cut_after(LIMIT, GRACE, lambda: results.add({"failed": hung})), closing(PARTS[part]()) as measurements:
            for case, measure in measurements:
                _measure(results, case, measure)
    except (Exception, CutError) as error:
        traceback.print_exc()
        results.add(failure(error))
    return results.failed


def _measure(results: Results, case: dict[str, object], measure: Callable[[], object]) -> None:
    """Add the rows of one measurement as they come, and one that says why where it breaks off."""
    try:
        for row in measure():  # type: ignore[attr-defined]
            results.add(row)
    except Exception as error:
        traceback.print_exc()
        results.add(case | failure(error))


def in_its_own_process(part: str) -> int:
    """Run a part; above 0 where anything failed."""
    code = subprocess.run([sys.executable, "-m", "bench.gpu", "--part", part], check=False).returncode
    if code not in (0, 1):
        print(f"{part} ended with exit code {code}; the rows before that are kept", flush=True)
    return abs(code)


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
    if chosen.part:
        return 1 if run(chosen.part) else 0
    failed = [part for part in PARTS if in_its_own_process(part)]
    print(f"failed: {', '.join(failed)}" if failed else "all parts ran through")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
