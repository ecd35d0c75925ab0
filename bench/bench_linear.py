"""The whole layer, forward and backward, against a dense bf16 layer and the same layer without its sparse part.

    OMP_NUM_THREADS=2 python bench/bench_linear.py

``dense`` is the forward product and dX of a plain bf16 matrix, which any training pays. Targets: at most 1.35 of it at
2048 x 2048 and 1.2 at 4096 x 4096 (512 tokens, rank 16, density 0.6%), and the sparse part at most 1.03 of the layer
without.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import delta, medians, quantized, report

from qrosa import ops

RANK = 16


def layer(rows: int, columns: int, tokens: int, density: float, dropout: float) -> Callable[[], object]:
    """Forward and backward of one layer, all gradients."""
    nf4, _, _ = quantized(rows, columns)
    csr = delta(rows, columns, density) if density else None
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, requires_grad=True)
    a = (torch.randn(RANK, columns) * columns**-0.5).bfloat16().requires_grad_()
    b = torch.zeros(rows, RANK, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, rows, dtype=torch.bfloat16)
    wanted = [x, a, b]
    if csr is not None:
        csr = csr._replace(values=csr.values.requires_grad_())
        wanted.append(csr.values)

    def run() -> object:
        y = ops.linear(x, nf4, rows, None, csr, a, b, 1.0, dropout, 7)
        return torch.autograd.grad(y, wanted, dy)

    return run


def measure(rows: int, columns: int, tokens: int) -> dict[str, object]:
    """One shape."""
    x, dy = torch.randn(tokens, columns).bfloat16(), torch.randn(tokens, rows).bfloat16()
    weight = torch.randn(rows, columns).bfloat16()
    times = medians(
        {
            "dense": lambda: (x @ weight.t(), dy @ weight),
            "plain": layer(rows, columns, tokens, 0.0, 0.0),
            "sparse": layer(rows, columns, tokens, 0.006, 0.0),
            "dropout": layer(rows, columns, tokens, 0.006, 0.05),
        }
    )
    return {
        "shape": f"{rows}x{columns}",
        "tokens": tokens,
        **{f"{name}_ms": seconds * 1e3 for name, seconds in times.items()},
        "plain_over_dense": times["plain"] / times["dense"],
        "sparse_over_dense": times["sparse"] / times["dense"],
        "sparse_over_plain": times["sparse"] / times["plain"],
        "dropout_over_dense": times["dropout"] / times["dense"],
    }


if __name__ == "__main__":
    report("linear", [measure(*case) for case in ((2048, 2048, 512), (4096, 4096, 512), (1536, 576, 512))])
