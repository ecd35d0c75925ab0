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

compiled: set[str] = set()
"""Device types that a compiled library serves; ``library.py`` fills it."""

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
    """While inside, ``meta`` tensors count as the CPU's: their scratch lasts, as a simulation of the CPU needs."""
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


_AMX = 4
"""The code of AMX in ``qrosa::cpu_isa``."""
_FUSED_TOKENS = 16
"""From so many tokens on, a product that decodes as it goes fills its tiles."""


def _fuses(x: torch.Tensor, nf4: NF4Operands) -> bool:
    """Whether the product with W_eff can run without writing W_eff down: bf16 on a CPU with matrix tiles."""
    if x.device.type not in _kept_on or x.dtype != torch.bfloat16 or x.shape[0] < _FUSED_TOKENS:
        return False
    return nf4.block_size == 64 and "cpu" in compiled and torch.ops.qrosa.cpu_isa(-1) == _AMX


def product(
    x: torch.Tensor,
    nf4: NF4Operands,
    csr: CsrOperands | None,
    shape: tuple[int, int],
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x W_eff^T + left right^T + bias, [T, N]; x [T, K], left [T, r], right [N, r]."""
    if shape[1] % 64 == 0 and _fuses(x, nf4):
        wide_bias = None if bias is None else bias.float()
        return torch.ops.qrosa.dequant_matmul(  # type: ignore[no-any-return]
            x, *nf4, *(csr or (None, None, None)), *shape, True, left, right, wide_bias
        )
    weight = effective_weight(nf4, csr, shape, x)
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y if left is None or right is None else y.addmm_(left, right.t())


def product_backward(
    dy: torch.Tensor,
    nf4: NF4Operands,
    csr: CsrOperands | None,
    shape: tuple[int, int],
    left: torch.Tensor | None,
    right: torch.Tensor | None,
) -> torch.Tensor:
    """dy W_eff + left right, [T, K]; dy [T, N], left [T, r], right [r, K]."""
    if shape[1] % 64 == 0 and _fuses(dy, nf4):
        return torch.ops.qrosa.dequant_matmul(  # type: ignore[no-any-return]
            dy, *nf4, *(csr or (None, None, None)), *shape, False, left, right, None
        )
    dx = dy @ effective_weight(nf4, csr, shape, dy)
    return dx if left is None or right is None else dx.addmm_(left, right)


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
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    projected, left, right = x.new_empty((0,)), None, None
    if a is not None and b is not None:
        projected = dropped(rows, dropout_p, seed) @ a.to(x.dtype).t()
        left, right = projected * scale, b.to(x.dtype)
    y = product(rows, nf4, csr, (out_features, x.shape[-1]), left, right, bias)
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
    inner = right = None
    if a is not None and b is not None:
        right = a.to(x.dtype)
        inner = (dy_rows @ b.to(x.dtype)).mul_(scale) if needs_x or needs_a else None  # [T, r]
    if needs_x:
        fold = dropout_p == 0.0  # a mask stands between the low-rank part and dX
        shape = (dy.shape[-1], x.shape[-1])
        dx = product_backward(dy_rows, nf4, csr, shape, inner if fold else None, right if fold else None)
        if inner is not None and right is not None and not fold:
            dx.add_(dropped(inner @ right, dropout_p, seed))
    if needs_a and a is not None and inner is not None:
        da = (inner.t() @ dropped(x_rows, dropout_p, seed)).to(a.dtype)
    if needs_b and b is not None:
        db = (dy_rows.t() @ projected).mul_(scale).to(b.dtype)
    if needs_values and csr is not None:
        dvalues = _sparse_gradient(dy_rows, x_rows.contiguous(), csr)
    if needs_bias:
        dbias = dy_rows.sum(0)
    return dx.view(x.shape) if needs_x else dx, dvalues, da, db, dbias


def _sparse_gradient(dy: torch.Tensor, x: torch.Tensor, csr: CsrOperands) -> torch.Tensor:
    if x.dtype == torch.float64:
        return reference.sddmm(dy, x, csr.row_ptr, csr.col).to(csr.values.dtype)
    return torch.ops.qrosa.sddmm(dy, x, csr.row_ptr, csr.col)  # type: ignore[no-any-return]
