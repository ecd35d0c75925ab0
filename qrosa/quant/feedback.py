"""Rounding with error feedback: columns still to be rounded take over the error of those that were.

GPTQ (Frantar et al., arXiv 2210.17323) on the NF4 grid. In the order of ``Factor``, with U of H^-1 = U^T U:

    q_j = nearest level to w_j,    e_j = (w_j - q_j) / U_jj,    w_k <- w_k - e_j U_jk   for every later k

which gives each step the least tr((W - Q) H (W - Q)^T) that the columns left can reach. Columns are taken in blocks:
inside a block one by one, then one product carries the block's errors to all later ones. A position of a sparse part
is not rounded: it keeps the value that feedback has given it, and passes no error on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qrosa.quant.grid import Grid
from qrosa.quant.hessian import Factor

_BLOCK = 96


@dataclass(frozen=True)
class Rounded:
    """What rounding chose.

    Attributes:
        codes: uint8 [N, K], 0 to 15.
        wanted: fp32 [N, K], each value as feedback had made it when its turn came: what it was rounded from, and what
            a sparse position should hold.
    """

    codes: Tensor
    wanted: Tensor


@torch.no_grad()
def round_with_feedback(weight: Tensor, scales: Tensor, factored: Factor, exact: Tensor | None = None) -> Rounded:
    """Choose the codes of a weight.

    Args:
        weight: fp32 [N, K]. Matrices that share an input may be stacked along N.
        scales: fp32 [N, K], the stored maximum of each value's block.
        factored: Of the input's second moments.
        exact: bool [N, K], positions that a sparse part holds; None for none.
    """
    grid = Grid(weight.device)
    order, upper = factored.order, factored.upper
    # Transposed: a column of W is a contiguous row here.
    work = weight.mT[order].contiguous()
    steps = scales.clamp_min(torch.finfo(torch.float32).tiny).mT[order].contiguous()
    held = None if exact is None else exact.mT[order].contiguous()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        errors = torch.empty_like(work[start:stop])
        for j in range(start, stop):
            level = grid.codes(work[j] / steps[j])
            codes[j] = level
            error = (work[j] - grid.levels[level] * steps[j]) / upper[j, j]
            if held is not None:
                error.masked_fill_(held[j], 0)
            errors[j - start] = error
            work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].mT, errors, alpha=-1)
    back = torch.argsort(order)
    return Rounded(codes[back].mT.contiguous(), work[back].mT.contiguous())
