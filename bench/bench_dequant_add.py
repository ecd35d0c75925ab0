"""dequant_add with and without the delta, against bitsandbytes' dequantize_4bit without one.

    OMP_NUM_THREADS=2 python bench/bench_dequant_add.py

Target: with a delta of density 0.6%, at most 0.8 of bitsandbytes' time. bitsandbytes allocates its output; so does the
third candidate, which shows what is owed to reusing the scratch.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
from measure import delta, medians, quantized, report

from qrosa import ops


def measure(rows: int, columns: int) -> dict[str, object]:
    """One shape; GB/s counts the packed codes read and the bf16 written."""
    nf4, packed, state = quantized(rows, columns)
    csr = delta(rows, columns, 0.006)
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    times = medians(
        {
            "bnb": lambda: bnb.dequantize_4bit(packed, state),
            "plain": lambda: ops.dequant_add(nf4, None, out),
            "delta": lambda: ops.dequant_add(nf4, csr, out),
            "delta_fresh": lambda: ops.dequant_add(nf4, csr, torch.empty_like(out)),
        }
    )
    return {
        "shape": f"{rows}x{columns}",
        **{f"{name}_ms": seconds * 1e3 for name, seconds in times.items()},
        "delta_over_bnb": times["delta"] / times["bnb"],
        "delta_fresh_over_bnb": times["delta_fresh"] / times["bnb"],
        "delta_over_plain": times["delta"] / times["plain"],
        "gb_per_s": rows * columns * 2.5 / times["delta"] / 1e9,
    }


if __name__ == "__main__":
    report("dequant_add", [measure(*shape) for shape in ((2048, 2048), (4096, 4096), (1536, 576))])
