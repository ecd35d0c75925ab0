"""The whole layer: forward and backward of ``qrosa::linear`` out of the other ops and three matrix products.

    Y = X W_eff^T + (alpha / r) drop(X) A^T B^T + bias,      W_eff = deq(Wq) + S

W_eff is rebuilt in backward instead of kept: one pass over 4-bit data costs less than the memory of a dense layer.
It lives in scratch (``workspace.py``) and never leaves the op. The dropout mask is drawn again from its seed. What is
kept: X once, and drop(X) A^T [T, r], which is r / K of X and saves a second read of X for dB.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qrosa.ops import devices, dropout, products, reference, schema, workspace
from qrosa.ops.operands import NESTED_BLOCK, NO_DELTA, CsrOperands, NF4Operands

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    values: bool
    a: bool
    b: bool
    bias: bool


def effective_weight(
    nf4: NF4Operands, csr: CsrOperands | None, shape: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """deq(Wq) + S [N, K] in ``like``'s dtype, in scratch that the next call overwrites."""
    if like.dtype == torch.float64:  # kernels end at fp32; fp64 is for checking gradients
        return reference.effective_weight(nf4, csr, shape, like.dtype)
    out = workspace.scratch(*shape, like)
    torch.ops.qrosa.dequant_add(*nf4, *(csr or NO_DELTA), out)
    return out


def dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x with a share ``p`` of its elements zeroed and the rest scaled up; the same seed drops the same elements."""
    if p == 0.0:
        return x
    if x.dtype == torch.float64:
        return dropout.dropout(x, p, seed)
    return torch.ops.qrosa.dropout(x.contiguous(), p, seed)  # type: ignore[no-any-return]


_AMX = 4
"""The code of AMX in ``qrosa::cpu_isa``."""
_FUSED_TOKENS = 16
"""From so many tokens on, a product that decodes as it goes fills its tiles."""
_FEWEST_ROWS = 64
"""Rows of a matrix that are decoded together."""
_MASKED_RANK = 256
"""The highest rank whose product with a dropout mask the tiles hold (``kMaskedRank``)."""


def _fuses(x: torch.Tensor, nf4: NF4Operands, a: torch.Tensor | None, dropout_p: float) -> bool:
    """Whether one kernel can do the layer without writing W_eff down: bf16 on a CPU with matrix tiles."""
    if x.dtype != torch.bfloat16 or not workspace.lasts_on(x.device) or nf4.block_size != 64 or x.shape[-1] % 64:
        return False
    if x.numel() < _FUSED_TOKENS * x.shape[-1] or (dropout_p and a is not None and a.shape[0] > _MASKED_RANK):
        return False
    return devices.is_served("cpu") and torch.ops.qrosa.cpu_isa(-1) == _AMX


def product(
    x: torch.Tensor,
    nf4: NF4Operands,
    csr: CsrOperands | None,
    shape: tuple[int, int],
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x W_eff^T + left right^T + bias, [T, N]; x [T, K], left [T, r], right [N, r].

    The wide product is added to the thin one, not the other way round: libraries add before they round, so small
    updates are rounded to their own size first, and not lost in a rounded y.
    """
    near = None if bias is None else bias.to(x.dtype)
    if left is None or right is None:
        return torch.nn.functional.linear(x, effective_weight(nf4, csr, shape, x), near)
    thin = left @ right.t() if near is None else torch.addmm(near, left, right.t())
    return thin.addmm_(x, effective_weight(nf4, csr, shape, x).t())


def forward(
    x: torch.Tensor,
    nf4: NF4Operands,
    out_features: int,
    bias: torch.Tensor | None,
    csr: CsrOperands | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y [..., N] and the projected input drop(X) A^T [T, r] (empty without a low-rank part)."""
    if products.widens(x):
        y, projected = forward(x.float(), nf4, out_features, bias, csr, a, b, scale, dropout_p, seed)
        return y.to(x.dtype), projected.to(x.dtype)
    rows = _rows(x)
    a, b = _in(a, x.dtype), _in(b, x.dtype)
    if _fuses(rows, nf4, a, dropout_p):
        wide_bias = _in(bias, torch.float32)
        y, projected = torch.ops.qrosa.linear_tiles(
            rows, *nf4, out_features, wide_bias, *(csr or NO_DELTA), a, b, scale, dropout_p, seed
        )
        return y.view(*x.shape[:-1], out_features), projected
    if x.dtype == torch.float64:
        schema.check_linear(x, nf4, out_features, bias, csr, a, b)
    else:  # whatever decodes the weight checks base and delta itself; twice would be a tenth of a small layer's time
        schema.check_dense(x, out_features, bias, a, b)
    projected, left = x.new_empty((0,)), None
    if a is not None:
        projected = dropped(rows, dropout_p, seed) @ a.t()
        left = projected * scale
    y = product(rows, nf4, csr, (out_features, x.shape[-1]), left, b, bias)
    return y.view(*x.shape[:-1], out_features), projected


def unread(
    x: torch.Tensor,
    nf4: NF4Operands,
    out_features: int,
    bias: torch.Tensor | None,
    csr: CsrOperands | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``forward`` gives but for the values of Y [..., N], which takes no memory; the rest has the same bits."""
    y = x.new_zeros(()).expand(*x.shape[:-1], out_features)
    if a is None or b is None:
        return y, x.new_empty((0,))
    rows = _rows(x.float() if products.widens(x) else x)
    a, b = a.to(rows.dtype), b.to(rows.dtype)
    if _fuses(rows, nf4, a, dropout_p):  # the tiles sum in an order of their own: a few rows of the matrix keep to it
        count = min(_FEWEST_ROWS, out_features)
        first = _first_rows(nf4, count * x.shape[-1])
        settings = (scale, dropout_p, seed)
        projected = torch.ops.qrosa.linear_tiles(rows, *first, count, None, *NO_DELTA, a, b[:count], *settings)[1]
    else:
        projected = dropped(rows, dropout_p, seed) @ a.t()
    return y, projected.to(x.dtype)


def _first_rows(nf4: NF4Operands, elements: int) -> NF4Operands:
    """The first rows of a packed matrix; they end with a block."""
    blocks = elements // nf4.block_size
    scale = nf4.absmax_scale
    return nf4._replace(
        codes=nf4.codes[: elements // 2],
        absmax=nf4.absmax[:blocks],
        absmax_scale=None if scale is None else scale[: -(-blocks // NESTED_BLOCK)],
    )


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[T, n], contiguous, of [..., n]."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _in(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    projected: torch.Tensor,
    nf4: NF4Operands,
    csr: CsrOperands | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    *needed: bool,
) -> Gradients:
    """Gradients of x, values, a, b and bias; an empty tensor for each that ``needed`` (as in ``Needs``) leaves out."""
    if products.widens(x):
        # The sparse gradient reads 16 bits and sums in fp32 as it is.
        wide, without_values = (dy.float(), x.float(), projected.float()), Needs(*needed)._replace(values=False)
        dx, dvalues, da, db, dbias = backward(*wide, nf4, csr, a, b, scale, dropout_p, seed, *without_values)
        if Needs(*needed).values and csr is not None:
            dvalues = _sparse_gradient(_rows(dy), _rows(x), csr)
        return dx.to(x.dtype), dvalues, da, db, dbias
    needs = Needs(*needed)
    x_rows, dy_rows = x.reshape(-1, x.shape[-1]), _rows(dy)
    left, right = _in(b, x.dtype), _in(a, x.dtype)
    dbias = dy_rows.sum(0) if needs.bias else x.new_empty((0,))
    if _fuses(x_rows, nf4, a, dropout_p):
        dx, dvalues, da, db = torch.ops.qrosa.linear_tiles_backward(
            dy_rows, x_rows.contiguous(), projected, *nf4, *(csr or NO_DELTA), right, left, scale, dropout_p, seed,
            *needs[:4],
        )  # fmt: skip
    else:
        dx, dvalues, da, db = _composed_backward(
            dy_rows, x_rows, projected, nf4, csr, right, left, scale, dropout_p, seed, needs
        )
    if needs.a and a is not None:
        da = da.to(a.dtype)
    if needs.b and b is not None:
        db = db.to(b.dtype)
    return dx.view(x.shape) if needs.x else dx, dvalues, da, db, dbias


def _composed_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    projected: torch.Tensor,
    nf4: NF4Operands,
    csr: CsrOperands | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    needs: Needs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x [T, K], values, a and b out of the other ops and PyTorch's products."""
    dx = dvalues = da = db = x.new_empty((0,))
    inner = None
    if b is not None and (needs.x or needs.a):
        inner = (dy @ b).mul_(scale)  # [T, r]
    if needs.x:
        shape = (dy.shape[-1], x.shape[-1])
        if inner is None or a is None:
            dx = dy @ effective_weight(nf4, csr, shape, dy)
        else:  # as in product(); the weight last, so that it never meets the two terms that dropout needs
            dx = dropped(inner @ a, dropout_p, seed)
            dx.addmm_(dy, effective_weight(nf4, csr, shape, dy))
    if needs.a and inner is not None:
        da = inner.t() @ dropped(x, dropout_p, seed)
    if needs.b:
        db = (dy.t() @ projected).mul_(scale)
    if needs.values and csr is not None:
        dvalues = _sparse_gradient(dy, x.contiguous(), csr)
    return dx, dvalues, da, db


def _sparse_gradient(dy: torch.Tensor, x: torch.Tensor, csr: CsrOperands) -> torch.Tensor:
    if x.dtype == torch.float64:
        return reference.sddmm(dy, x, csr.row_ptr, csr.col).to(csr.values.dtype)
    return torch.ops.qrosa.sddmm(dy, x, csr.row_ptr, csr.col)  # type: ignore[no-any-return]
