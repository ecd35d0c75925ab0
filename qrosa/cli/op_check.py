"""Whether each op works on a device: a small matrix through all of them, beside what plain torch makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ERROR = 0.02  # of the largest value: bf16 results of short sums, with room


def wrong_ops(device: str) -> list[str]:
    """What each op does wrong on a device: fails, as kernels for another kind of card do, or gives other values.

    A small matrix goes through every op that training and generation use, beside plain torch's composition of them.
    """
    import torch

    from qrosa import ops
    from qrosa.ops import reference
    from qrosa.quant.nf4 import NF4Weight

    rows, columns, tokens = 64, 128, 32
    draw = torch.Generator().manual_seed(0)
    dense, x, dy = (torch.randn(n, k, generator=draw) for n, k in ((rows, columns), (tokens, columns), (tokens, rows)))
    packed = NF4Weight.quantize(dense).to(device)
    nf4 = packed.operands()
    x, dy = x.bfloat16().to(device), dy.bfloat16().to(device)
    row_ptr = torch.arange(rows + 1, dtype=torch.int32, device=device)
    col = torch.arange(rows, device=device).to(torch.uint16)
    csr = ops.CsrOperands(row_ptr, col, torch.ones(rows, device=device))
    weight = reference.effective_weight(nf4, csr, (rows, columns), torch.float32)
    gradient = dy.float().t() @ x.float()
    decoded, statistic = torch.empty_like(weight), torch.zeros(rows, columns, device=device)
    y = x.float() @ weight.t()
    tries: dict[str, tuple[Callable[[], Any], Any]] = {
        "dequant_add": (lambda: ops.dequant_add(nf4, csr, decoded), weight),
        "sddmm": (lambda: ops.sddmm(dy, x, row_ptr, col), gradient.diagonal()),
        "dequant_spmm": (lambda: ops.dequant_spmm(x[:4], nf4, csr, rows), y[:4]),
        "score_accumulate": (lambda: ops.score_accumulate(dy, x, statistic, False), gradient),
        "linear": (lambda: ops.linear(x, nf4, rows, csr=csr), y),
    }
    written = {"dequant_add": decoded, "score_accumulate": statistic}
    faults = []
    for name, (run, expected) in tries.items():
        try:
            returned = run()
            found = written.get(name, returned)
            error = float((found.float() - expected).abs().max() / expected.abs().max())
        except Exception as failure:
            faults.append(f"{name} fails on {device}: {(str(failure).splitlines() or [''])[0]}")
            continue
        if not error < _ERROR:
            faults.append(f"{name} is wrong on {device}, by {error:.0%}")
    return faults
