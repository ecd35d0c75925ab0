"""The layer for few rows and no gradient: by other ops where no kernel fuses it, by a plan where calls must be cheap.

The CPU kernel (``csrc/cpu/dequant_spmm.h``) sums the base, both adapters and the bias in fp32 and rounds once; the
composition rounds each part as it is added.

A layer of a small model takes some 20 us a token, and handing eleven tensors to an op takes a third of that. So a layer
that stays as it is for many tokens is checked once and packed into a plan, which holds the addresses of its data. That
is for one scope, which keeps the tensors and changes none of them (``qrosa.model.head.generating``); a layer outside
such a scope is called with its tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qrosa.ops import devices
from qrosa.ops.operands import NO_DELTA, CsrOperands, NF4Operands


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
    y: torch.Tensor = torch.ops.qrosa.dequant_spmm(rows, *nf4, *(csr or NO_DELTA), out_features)
    if a is not None and b is not None:
        y.addmm_(rows @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scale)
    if bias is not None:
        y.add_(bias)
    return y.view(*x.shape[:-1], out_features)


class DecodePlan(NamedTuple):
    """A layer with a fixed place in memory."""

    packed: torch.Tensor
    """What ``qrosa::decode_planned`` takes beside x."""
    kept: tuple[torch.Tensor | None, ...]
    """The tensors whose addresses the plan holds."""


def plan_decode(
    nf4: NF4Operands,
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    csr: CsrOperands | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
) -> DecodePlan | None:
    """The plan of a layer [N, K], or None where no kernel takes one: only the CPU's does."""
    if nf4.codes.device.type != "cpu" or not devices.is_served("cpu"):
        return None
    parts = (bias, *(csr or NO_DELTA), a, b)
    packed = torch.ops.qrosa.decode_plan(*nf4, *shape, *parts, scale)
    return DecodePlan(packed, (*nf4[:5], *parts))
