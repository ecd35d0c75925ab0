"""The low-rank product that lowers a layer's output error most.

Of all rank-r products L the one with the least tr((E - L) H (E - L)^T), E = W - W_eff what is left of the quantisation
error and H = X^T X, is the projection of E on the r leading eigenvectors of E H E^T:

    L = B A,    B = U_r,    A = U_r^T E

With H = C C^T it is the truncated SVD of E C, times C^-1 (QERA-exact, arXiv 2410.06040; CLoQ), without needing C or its
inverse. The eigenvectors come from subspace iteration, products alone: E H E^T [N, N] is never built.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING = 16
_ITERATIONS = 8


@torch.no_grad()
def best_low_rank(error: Tensor, moments: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors of the best rank-r product.

    Args:
        error: fp32 [N, K].
        moments: fp32 [K, K], X^T X, in the columns' own order; any positive scale.
        rank: At most min(N, K).
        seed: Of the iteration's start, drawn on the CPU.

    Returns:
        B fp32 [N, r] and A fp32 [r, K], of equal magnitude.
    """
    rows, columns = error.shape
    width = min(rank + _OVERSAMPLING, rows, columns)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rows, width, generator=generator).to(error.device)
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(error @ (moments @ (error.mT @ basis)))
    inside = error.mT @ basis
    _, turned = torch.linalg.eigh((inside.mT @ (moments @ inside)).double())
    basis = basis @ turned.flip(1)[:, :rank].to(basis.dtype)
    a = basis.mT @ error
    share = a.norm(dim=1).clamp_min(torch.finfo(a.dtype).tiny).sqrt()
    return basis * share, a / share[:, None]
