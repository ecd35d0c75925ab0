"""sddmm against the dense gradient and a gather of it.

    OMP_NUM_THREADS=2 python bench/bench_sddmm.py

Target: at most 0.3 of the dense way's time at 2048 x 2048, 512 tokens, density 0.6%.
"""

from __future__ import annotations

import torch
from measure import delta, medians, report

from qrosa import ops


def measure(rows: int, columns: int, tokens: int, density: float) -> dict[str, object]:
    """One shape; GFLOP/s counts two operations a token and stored position."""
    csr = delta(rows, columns, density)
    index = (torch.repeat_interleave(torch.arange(rows), csr.row_ptr.diff().long()), csr.col.long())
    dy = torch.randn(tokens, rows, dtype=torch.bfloat16)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    times = medians(
        {
            "dense": lambda: (dy.t() @ x)[index],
            "sddmm": lambda: ops.sddmm(dy, x, csr.row_ptr, csr.col),
        }
    )
    return {
        "shape": f"{rows}x{columns}",
        "tokens": tokens,
        "density": density,
        **{f"{name}_ms": seconds * 1e3 for name, seconds in times.items()},
        "sddmm_over_dense": times["sddmm"] / times["dense"],
        "gflop_per_s": 2 * tokens * csr.col.numel() / times["sddmm"] / 1e9,
    }


if __name__ == "__main__":
    cases = ((2048, 2048, 512, 0.006), (2048, 2048, 512, 0.003), (4096, 4096, 512, 0.006), (1536, 576, 512, 0.006))
    report("sddmm", [measure(*case) for case in cases])
