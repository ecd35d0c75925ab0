"""The whole layer: forward and backward of ``qrosa::linear`` out of the other ops and three matrix products.

    Y = X W_eff^T + (alpha / r) drop(X) A^T B^T + bias,      W_eff = deq(Wq) + S

W_eff is rebuilt in backward instead of kept: one pass over 4-bit data costs less than the memory of a dense layer.
It lives in a workspace that a thread reuses for all layers (fresh pages for each layer would cost more than the
dequantising itself), and never leaves the op. The dropout mask is drawn again from its seed. What is kept: X once,
and drop(X) A^T [T, r], which is r / K of X and saves a second read of X for dB.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qrosa.ops import dropout, reference
from qrosa.ops.operands import CsrOperands, NF4Operands

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_workspace = threading.local()
_kept_on = {"cpu"}
"""Device types whose scratch outlives a call; on others the allocator is quick, and the memory is wanted back."""


def _scratch(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised [rows, columns] in ``like``'s dtype; on the CPU from this thread's grow-only buffer."""
    if like.device.type not in _kept_on:
        return like.new_empty((rows, columns))
    size = rows * columns * like.element_size()
    buffer: torch.Tensor | None = getattr(_workspace, "buffer", None)
    if buffer is None or buffer.numel() < size or buffer.device != like.device:
        with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside it
            buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        _workspace.buffer = buffer
    return buffer[:size].view(like.dtype).view(rows, columns)


def release_workspace() -> None:
    """Frees this thread's scratch, for a process that is done with the model."""
    _workspace.buffer = None


@contextmanager
def meta_like_cpu() -> Iterator[None]:
    """While inside, ``meta`` tensors are treated as the CPU's: their scratch lasts, as a simulation of the CPU needs."""
    release_workspace()
    _kept_on.add("meta")
    try:
        yield
    finally:
        _kept_on.discard("meta")
        release_workspace()


def effective_weight(
    nf4: NF4Operands, csr: CsrOperands | None, shape: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """deq(Wq) + S [N, K] in ``like``'s dtype, in scratch that the next call overwrites."""
    if like.dtype == torch.float64:  # kernels end at fp32; fp64 is for checking gradients
        return reference.effective_weight(nf4, csr, shape, like.dtype)
    out = _scratch(*shape, like)
    torch.ops.qrosa.dequant_add(*nf4, *(csr or (None, None, None)), out)
    return out


def dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x with a share ``p`` of its elements zeroed and the rest scaled up; the same seed drops the same elements."""
    if p == 0.0:
        return x
    if x.dtype == torch.float64:
        return dropout.dropout(x, p, seed)
    return torch.ops.qrosa.dropout(x.contiguous(), p, seed)  # type: ignore[no-any-return]


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
    rows = x.reshape(-1, x.shape[-1])
    weight = effective_weight(nf4, csr, (out_features, rows.shape[1]), x)
    y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    projected = x.new_empty((0,))
    if a is not None and b is not None:
        projected = dropped(rows, dropout_p, seed) @ a.to(x.dtype).t()
        y.addmm_(projected, b.to(x.dtype).t(), alpha=scale)
    return y.view(*x.shape[:-1], out_features), projected


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
    needs: list[bool],
) -> Gradients:
    """Gradients of x, values, a, b and bias; an empty tensor for each one that ``needs`` does not ask for."""
    needs_x, needs_values, needs_a, needs_b, needs_bias = needs
    x_rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).contiguous()
    dx = dvalues = da = db = dbias = x.new_empty((0,))
    if needs_x:
        dx = dy_rows @ effective_weight(nf4, csr, (dy.shape[-1], x.shape[-1]), x)
    if a is not None and b is not None:
        inner = (dy_rows @ b.to(x.dtype)).mul_(scale) if needs_x or needs_a else dx  # [T, r]
        if needs_x:
            _add_low_rank_gradient(dx, inner, a.to(x.dtype), dropout_p, seed)
        if needs_a:
            da = (inner.t() @ dropped(x_rows, dropout_p, seed)).to(a.dtype)
        if needs_b:
            db = (dy_rows.t() @ projected).mul_(scale).to(b.dtype)
    if needs_values and csr is not None:
        dvalues = _sparse_gradient(dy_rows, x_rows.contiguous(), csr)
    if needs_bias:
        dbias = dy_rows.sum(0)
    return dx.view(x.shape) if needs_x else dx, dvalues, da, db, dbias


def _add_low_rank_gradient(dx: torch.Tensor, inner: torch.Tensor, a: torch.Tensor, dropout_p: float, seed: int) -> None:
    if dropout_p > 0.0:
        dx.add_(dropped(inner @ a, dropout_p, seed))
    else:
        dx.addmm_(inner, a)


def _sparse_gradient(dy: torch.Tensor, x: torch.Tensor, csr: CsrOperands) -> torch.Tensor:
    if x.dtype == torch.float64:
        return reference.sddmm(dy, x, csr.row_ptr, csr.col).to(csr.values.dtype)
    return torch.ops.qrosa.sddmm(dy, x, csr.row_ptr, csr.col)  # type: ignore[no-any-return]
