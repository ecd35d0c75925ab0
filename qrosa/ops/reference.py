"""The ops in plain PyTorch: the oracle of every test, and what runs where no compiled library serves a device.

Each function says what its kernel computes in the fewest lines, and computes it in fp64 when its inputs or output are
fp64, else in fp32. It gives up speed and memory for that: dequantising builds an index per element, and the sparse
gradient goes through dense strips. Everything is differentiable by PyTorch's own autograd, which is what
``linear`` here is for: the fused op's gradients are checked against it.
"""

from __future__ import annotations

import math

import torch

from qrosa.ops.operands import NESTED_BLOCK, NF4_TABLE, CsrOperands, NF4Operands

_STRIP_ROWS = 256
"""Rows of dY^T X held dense at a time."""

GELU_SCALE, GELU_CUBE = 2.0 * (2.0 / math.pi) ** 0.5, 0.044715
"""GELU by its tanh formula is g sigmoid(GELU_SCALE (g + GELU_CUBE g^3)), because (1 + tanh u) / 2 = sigmoid(2 u)."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_absmax(nf4: NF4Operands) -> torch.Tensor:
    """Effective absmax fp32 [blocks], bit-equal to bitsandbytes: a product and a sum, each rounded to fp32."""
    if nf4.absmax_code is None or nf4.absmax_scale is None or nf4.absmax_offset is None:
        return nf4.absmax
    scale = nf4.absmax_scale.repeat_interleave(NESTED_BLOCK)[: nf4.absmax.numel()]
    return nf4.absmax_code[nf4.absmax.long()] * scale + nf4.absmax_offset


def dequantize(nf4: NF4Operands, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The dense base [N, K] in ``dtype``; multiplied in fp32 (exact products of fp32 values in fp64)."""
    rows, columns = shape
    count = rows * columns
    table = torch.tensor(NF4_TABLE, dtype=torch.float32, device=nf4.codes.device).to(compute_dtype(dtype))
    nibbles = torch.stack((nf4.codes >> 4, nf4.codes & 15), dim=-1).reshape(-1)[:count]
    absmax = block_absmax(nf4).to(table.dtype).repeat_interleave(nf4.block_size)[:count]
    return (table[nibbles.long()] * absmax).to(dtype).view(rows, columns)


def row_indices(row_ptr: torch.Tensor, nnz: int) -> torch.Tensor:
    """The row of each stored value, int64 [nnz]."""
    rows = torch.arange(row_ptr.numel() - 1, device=row_ptr.device)
    return torch.repeat_interleave(rows, row_ptr.diff().long(), output_size=nnz)


def effective_weight(
    nf4: NF4Operands, csr: CsrOperands | None, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """deq(Wq) + S, [N, K]: summed in fp32 (fp64 for an fp64 result), rounded once to ``dtype``."""
    dense = dequantize(nf4, shape, compute_dtype(dtype))
    if csr is not None and csr.col.numel():
        index = (row_indices(csr.row_ptr, csr.col.numel()), csr.col.long())
        dense = dense.index_put(index, csr.values.to(dense.dtype), accumulate=True)
    return dense.to(dtype)


def dequant_add(nf4: NF4Operands, csr: CsrOperands | None, out: torch.Tensor) -> None:
    """Writes deq(Wq) + S into ``out`` [N, K]."""
    out.copy_(effective_weight(nf4, csr, (out.shape[0], out.shape[1]), out.dtype))


def sddmm(dy: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """(dY^T X) at the stored positions, [nnz] in fp32 (fp64 for fp64 inputs). dY [T, N], X [T, K]."""
    dtype = compute_dtype(x.dtype)
    out = torch.empty(col.numel(), dtype=dtype, device=x.device)
    if not col.numel():
        return out
    wide_x, rows, columns = x.to(dtype), row_indices(row_ptr, col.numel()), col.long()
    for start in range(0, dy.shape[1], _STRIP_ROWS):
        strip = dy[:, start : start + _STRIP_ROWS].to(dtype).t() @ wide_x
        first, last = (int(row_ptr[i]) for i in (start, min(start + _STRIP_ROWS, dy.shape[1])))
        out[first:last] = strip[rows[first:last] - start, columns[first:last]]
    return out


def dequant_spmm(x: torch.Tensor, nf4: NF4Operands, csr: CsrOperands | None, out_features: int) -> torch.Tensor:
    """x @ (deq(Wq) + S)^T, [T, N] in x's dtype; summed in fp32 over the unrounded weight. x [T, K]."""
    dtype = compute_dtype(x.dtype)
    weight = effective_weight(nf4, csr, (out_features, x.shape[1]), dtype)
    return (x.to(dtype) @ weight.t()).to(x.dtype)


def score_accumulate(dy: torch.Tensor, x: torch.Tensor, stat: torch.Tensor, square: bool) -> None:
    """Adds dY^T X, squared or not, to ``stat`` fp32 [N, K], a strip of rows at a time."""
    dtype = compute_dtype(stat.dtype)
    wide_x = x.to(dtype)
    for start in range(0, dy.shape[1], _STRIP_ROWS):
        strip = dy[:, start : start + _STRIP_ROWS].to(dtype).t() @ wide_x
        target = stat[start : start + _STRIP_ROWS]
        target.addcmul_(strip, strip) if square else target.add_(strip)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(offset + weight) x rstd as [..., d] in x's dtype, and rstd = 1 / rms(x) of each row [T]. Weight [d].

    ``rounds``: x rstd is rounded to x's dtype before the weight multiplies it.
    """
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    scaled = wide * rstd
    if rounds:
        scaled = scaled.to(x.dtype).to(dtype)
    return (scaled * (offset + weight.to(dtype))).to(x.dtype).contiguous(), rstd.flatten()


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float
) -> torch.Tensor:
    """The gradient of x [..., d]: rstd (g - x rstd^2 mean(g x)) with g = (offset + weight) dy."""
    dtype = compute_dtype(x.dtype)
    wide, scale = x.to(dtype), rstd.view(*x.shape[:-1], 1)
    gradient = dy.to(dtype) * (offset + weight.to(dtype))
    share = (gradient * wide).mean(-1, keepdim=True) * scale.square()
    return (scale * (gradient - wide * share)).to(x.dtype).contiguous()


def gate(gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    """act(gate) up in their dtype, the activation rounded first; GELU by its tanh formula, or SiLU."""
    dtype = compute_dtype(gate.dtype)
    wide = gate.to(dtype)
    active = torch.nn.functional.gelu(wide, approximate="tanh") if gelu else torch.nn.functional.silu(wide)
    return (active.to(gate.dtype).to(dtype) * up.to(dtype)).to(gate.dtype).contiguous()


def gate_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up."""
    dtype = compute_dtype(gate.dtype)
    wide = gate.to(dtype)
    cube = GELU_CUBE * wide * wide
    scaled = GELU_SCALE * (wide + cube * wide) if gelu else wide
    rise = GELU_SCALE * (1.0 + 3.0 * cube) if gelu else 1.0
    share = torch.sigmoid(scaled)
    slope = share + wide * rise * share * torch.sigmoid(-scaled)
    gradient = dy.to(dtype)
    dgate, dup = gradient * up.to(dtype) * slope, gradient * (wide * share)
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()


def linear(
    x: torch.Tensor,
    nf4: NF4Operands,
    out_features: int,
    bias: torch.Tensor | None,
    csr: CsrOperands | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """The whole layer, [..., N], differentiable through PyTorch's own ops and computed in x's dtype.

    Args:
        x: [..., K]. ``dropped`` [..., K] is what the low-rank part reads instead, where dropout is wanted.
    """
    weight = effective_weight(nf4, csr, (out_features, x.shape[-1]), x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    if a is not None and b is not None:
        source = x if dropped is None else dropped
        y = y + scale * ((source @ a.to(x.dtype).t()) @ b.to(x.dtype).t())
    return y
