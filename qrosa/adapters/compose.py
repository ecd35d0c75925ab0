"""W_eff, the weight that training had, out of its parts: the one composition, for whoever needs it as a matrix.

    W_eff = W + S + scale * B @ A,      times the low-rank form's gain of each row, if it has one

Training never builds it; the op sums the parts' products instead. What is merged and exported must still be what was
trained, so a test holds the op, the layer and the export to this in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrosa.adapters.low_rank import LowRank
from qrosa.sparse.csr import CsrDelta


@torch.no_grad()
def compose(weight: Tensor, low_rank: LowRank | None = None, sparse: CsrDelta | None = None) -> Tensor:
    """Turn a base's weight into W_eff, in place.

    Args:
        weight: W fp32 (or fp64) [N, K]: the decoded base, or the original. The parts may be on another device.
        low_rank: A and B.
        sparse: S.

    Returns:
        ``weight``.
    """
    add_parts(weight, low_rank, sparse)
    if low_rank is None or not low_rank.has_gain:
        return weight
    gain = low_rank.gain(lambda: weight)
    return weight.mul_(gain.to(weight.device, weight.dtype)[:, None])


@torch.no_grad()
def add_parts(weight: Tensor, low_rank: LowRank | None, sparse: CsrDelta | None) -> Tensor:
    """``weight`` + S + scale * B @ A, in place: W_eff before its rows are multiplied."""
    if sparse is not None:
        values = sparse.values.detach().to(weight.device, weight.dtype)
        weight.view(-1).index_add_(0, sparse.positions().to(weight.device), values)
    return weight if low_rank is None else low_rank.add_to(weight)
