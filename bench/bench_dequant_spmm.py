"""dequant_spmm for 1 to 16 rows, against dequantising first, a dense bf16 product, and the bandwidth of a copy.

    OMP_NUM_THREADS=2 python bench/bench_dequant_spmm.py

Target at one row: 70% of the bandwidth of a copy, counting the 4-bit bytes that are read against the bytes that a
copy of the same size reads. The row count where ``two_step`` wins is the rule in ``qrosa.ops`` (``_DECODE_ROWS``).
"""

from __future__ import annotations

import torch
from measure import delta, medians, quantized, report

from qrosa import ops


def measure(rows: int, columns: int, tokens: int) -> dict[str, object]:
    """One shape; the copy moves as many bytes as the packed matrix has."""
    nf4, _, _ = quantized(rows, columns)
    csr = delta(rows, columns, 0.006)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    scratch = torch.empty(rows, columns, dtype=torch.bfloat16)
    dense = torch.randn(rows, columns).bfloat16()
    source, target = torch.empty_like(nf4.codes), torch.empty_like(nf4.codes)

    def two_step() -> torch.Tensor:
        ops.dequant_add(nf4, csr, scratch)
        return x @ scratch.t()

    times = medians(
        {
            "spmm": lambda: ops.dequant_spmm(x, nf4, csr, rows),
            "spmm_plain": lambda: ops.dequant_spmm(x, nf4, None, rows),
            "two_step": two_step,
            "dense": lambda: x @ dense.t(),
            "copy": lambda: target.copy_(source),
        }
    )
    return {
        "shape": f"{rows}x{columns}",
        "tokens": tokens,
        **{f"{name}_ms": seconds * 1e3 for name, seconds in times.items()},
        "spmm_over_two_step": times["spmm"] / times["two_step"],
        "spmm_over_dense": times["spmm"] / times["dense"],
        "gb_per_s": nf4.codes.numel() / times["spmm"] / 1e9,
        "copy_gb_per_s": nf4.codes.numel() / times["copy"] / 1e9,
        "share_of_copy": times["copy"] / times["spmm"],
    }


if __name__ == "__main__":
    shapes = ((2048, 2048), (4096, 4096), (14336, 4096))
    single = [measure(*shape, 1) for shape in shapes]
    report("dequant_spmm", single + [measure(2048, 2048, tokens) for tokens in (2, 4, 8, 16)])
