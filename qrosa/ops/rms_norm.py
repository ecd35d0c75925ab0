"""RMSNorm as one op each way, and the module that stands in for transformers' own.

Written out in PyTorch, a norm widens x to fp32 and saves that; here x [T, d] is saved as it is, with 1 / rms of each
row. The arithmetic is in fp32 and rounds where the replaced module does. The weight is part of a frozen base and gets
no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qrosa.ops import reference
from qrosa.ops.schema import LIBRARY


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds: bool = True) -> Tensor:
    """(offset + weight) x / rms(x) over the last dimension. Differentiable in x.

    Args:
        x: [..., d] bf16, fp16 or fp32 (fp64: through the reference).
        weight: [d] in x's dtype, frozen.
        eps: Added to the mean of the squares.
        offset: 1 for Gemma's norms, whose weight is a difference from 1.
        rounds: x / rms(x) is rounded to x's dtype before the weight multiplies it, as in Llama; Gemma rounds once.

    Returns:
        [..., d] in x's dtype, its dimensions in x's order in memory.

    Raises:
        RuntimeError: The weight wants a gradient, or does not belong to x.
    """
    torch._check(not weight.requires_grad, lambda: "the weight of a norm is frozen: it gets no gradient")
    if x.dtype == torch.float64:
        return reference.rms_norm(x, weight, eps, offset, rounds)[0]
    if x.is_contiguous():
        return torch.ops.qrosa.rms_norm(x, weight, eps, offset, rounds)[0]  # type: ignore[no-any-return]
    # Heads are often transposed before they are normed: rows are taken as they lie.
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda axis: (-strides[axis], axis))
    rows = x.permute(order) if order[-1] == x.dim() - 1 else x
    y = torch.ops.qrosa.rms_norm(rows.contiguous(), weight, eps, offset, rounds)[0]
    if rows is x:
        return y  # type: ignore[no-any-return]
    return y.permute(sorted(range(x.dim()), key=order.__getitem__))  # type: ignore[no-any-return]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounds: bool) -> tuple[Tensor, Tensor]:
        y, rstd = _below_autograd(x, weight, eps, offset, rounds)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _drstd: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        x, weight, rstd = ctx.saved_tensors
        dx = torch.ops.qrosa.rms_norm_backward(dy.contiguous(), x, weight, rstd, ctx.offset)
        return dx, None, None, None, None


def _below_autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        output: tuple[Tensor, Tensor] = torch.ops.qrosa.rms_norm.default(*inputs)
    return output


def _rms_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wanted = torch.is_grad_enabled() and x.requires_grad
    return _RmsNorm.apply(x, *rest) if wanted else _below_autograd(x, *rest)  # type: ignore[no-untyped-call]


LIBRARY.impl("rms_norm", _rms_norm, "Autograd")


class RMSNorm(nn.Module):
    """A norm whose parameter is that of the module that it stands in for.

    Args:
        weight: [d], may be on ``meta``.
        eps: See ``rms_norm``, as
        offset: and
        rounds: too.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: float, rounds: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.offset, self.rounds = weight, eps, offset, rounds

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x [..., d]."""
        return rms_norm(x, self.weight, self.eps, self.offset, self.rounds)

    def extra_repr(self) -> str:
        """The settings, as they are printed."""
        return f"{self.weight.numel()}, eps={self.eps}, offset={self.offset}, rounds={self.rounds}"
