"""The layer for few rows and no gradient out of other ops: what ``qrosa::decode_linear`` is where no kernel fuses it.

The CPU kernel (``csrc/cpu/dequant_spmm.h``) sums the base, both adapters and the bias in fp32 and rounds once; here
each part is rounded as it is added.
"""

from __future__ import annotations

import torch

from qrosa.ops.operands import CsrOperands, NF4Operands


def decode_linear(
    x: torch.Tensor,
    nf4: NF4Operands,
    out_features: int,
    bias: torch.Tensor | None,
    csr: CsrOperands | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """x W_eff^T + scale * x A^T B^T + bias, [..., N] in x's dtype; x [..., K], a [r, K], b [N, r], bias [N]."""
    rows = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = torch.ops.qrosa.dequant_spmm(rows, *nf4, *(csr or (None, None, None)), out_features)
    if a is not None and b is not None:
        y.addmm_(rows @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scale)
    if bias is not None:
        y.add_(bias)
    return y.view(*x.shape[:-1], out_features)
