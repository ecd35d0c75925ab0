"""The ops: what a quantised linear layer with a sparse delta needs, as PyTorch custom ops with kernels for each device.

``schema.py`` is the contract, ``reference.py`` the oracle, ``linear.py`` the layer, ``csrc`` the kernels. The functions
here take ``NF4Operands`` and ``CsrOperands``; under them lie ``torch.ops.qrosa.*``, which take the same tensors one by
one. All of them work under fake tensors and ``torch.compile``. fp64 goes to the reference: the kernels end at fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from qrosa.ops import autograd as autograd
from qrosa.ops import library, reference
from qrosa.ops.decode import DecodePlan, plan_decode
from qrosa.ops.library import force_cpu_isa, force_sddmm_way
from qrosa.ops.operands import MAX_UINT16_COLUMNS, NESTED_BLOCK, NF4_TABLE, NO_DELTA, CsrOperands, NF4Operands
from qrosa.ops.workspace import release_workspace

__all__ = [
    "MAX_UINT16_COLUMNS",
    "NESTED_BLOCK",
    "NF4_TABLE",
    "CsrOperands",
    "DecodePlan",
    "NF4Operands",
    "decode_planned",
    "decode_rows",
    "dequant_add",
    "dequant_spmm",
    "force_cpu_isa",
    "force_sddmm_way",
    "linear",
    "plan_decode",
    "release_workspace",
    "score_accumulate",
    "sddmm",
    "status",
]

library.load()

_decode_linear = torch.ops.qrosa.decode_linear.default
decode_planned = torch.ops.qrosa.decode_planned.default
"""(x [..., K], the ``packed`` of a plan) -> [..., N]"""

_DECODE_ROWS = {"cpu": 15, "cuda": 16}
"""Up to so many rows, multiplying straight from 4 bits beats dequantising first (``bench/bench_dequant_spmm.py``)."""


def decode_rows(device: torch.device) -> int:
    """Up to so many rows of x, a layer without gradients is multiplied straight from 4 bits."""
    return _DECODE_ROWS.get(device.type, 0)


def dequant_add(nf4: NF4Operands, csr: CsrOperands | None, out: torch.Tensor) -> None:
    """Writes deq(Wq) + S into ``out``, rounded once.

    Args:
        nf4: The packed base [N, K].
        csr: The sparse delta [N, K], or None.
        out: [N, K] bf16, fp16 or fp32, contiguous; the caller's scratch.

    Raises:
        RuntimeError: Sizes or types that do not belong together, or a column outside the matrix.
    """
    if out.dtype == torch.float64:
        reference.dequant_add(nf4, csr, out)
    else:
        torch.ops.qrosa.dequant_add(*nf4, *(csr or NO_DELTA), out)


def sddmm(dy: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """The gradient of the sparse values: dY^T X at the stored positions only.

    Args:
        dy: [T, N], same dtype as ``x``.
        x: [T, K].
        row_ptr: int32 [N + 1].
        col: uint16 (K <= 65536) or int32 [nnz].

    Returns:
        fp32 [nnz] (fp64 for fp64 inputs). The same inputs give the same bits, whatever the number of threads.
    """
    if x.dtype == torch.float64:
        return reference.sddmm(dy, x, row_ptr, col)
    return torch.ops.qrosa.sddmm(dy, x, row_ptr, col)  # type: ignore[no-any-return]


def dequant_spmm(x: torch.Tensor, nf4: NF4Operands, csr: CsrOperands | None, out_features: int) -> torch.Tensor:
    """x @ (deq(Wq) + S)^T for few rows; the dense weight never exists.

    Args:
        x: [T, K].
        nf4: The packed base [N, K].
        csr: The sparse delta, or None.
        out_features: N.

    Returns:
        [T, N] in x's dtype, summed in fp32.
    """
    if x.dtype == torch.float64:
        return reference.dequant_spmm(x, nf4, csr, out_features)
    return torch.ops.qrosa.dequant_spmm(x, *nf4, *(csr or NO_DELTA), out_features)  # type: ignore[no-any-return]


def score_accumulate(dy: torch.Tensor, x: torch.Tensor, stat: torch.Tensor, square: bool) -> None:
    """Adds dY^T X (squared elementwise if ``square``) to ``stat`` fp32 [N, K], tile by tile. dY [T, N], X [T, K]."""
    torch.ops.qrosa.score_accumulate(dy, x, stat, square)


def linear(
    x: torch.Tensor,
    nf4: NF4Operands,
    out_features: int,
    bias: torch.Tensor | None = None,
    csr: CsrOperands | None = None,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:
    """The whole layer: x (deq(Wq) + S)^T + scale * drop(x) A^T B^T + bias.

    Differentiable in x, a, b, csr.values and bias. Backward keeps x, and drop(x) A^T which is [T, r]; it computes only
    the gradients that are asked for.

    Args:
        x: [..., K] bf16, fp16 or fp32 (fp64: through the reference).
        nf4: The packed base [N, K].
        out_features: N.
        bias: [N] or None.
        csr: The sparse delta or None; the gradient of its values is fp32.
        a: Low-rank A [r, K] or None.
        b: Low-rank B [N, r] or None.
        scale: alpha / r.
        dropout_p: Share of x that the low-rank part does not see; 0 draws no mask.
        seed: Of the dropout mask, which is a pure function of the seed and of an element's place in x.

    Returns:
        [..., N] in x's dtype.
    """
    if x.numel() <= _DECODE_ROWS.get(x.device.type, 0) * x.shape[-1] and _decodes(x, dropout_p):
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return _decode_linear(  # type: ignore[no-any-return]
            x.contiguous(), *nf4, out_features, bias, *(csr or NO_DELTA), a, b, scale
        )
    y, _projected = torch.ops.qrosa.linear(
        x, *nf4, out_features, bias, *(csr or NO_DELTA), a, b, scale, dropout_p, seed
    )
    return y  # type: ignore[no-any-return]


def _decodes(x: torch.Tensor, dropout_p: float) -> bool:
    """Whether few rows may go through the op that has neither gradients nor dropout.

    With gradients on, never, even where nothing here requires one: the two ops round differently, and a mask would
    depend on which layers are observed with it, below which the inputs of layers require none.
    """
    return not (dropout_p or x.dtype == torch.float64 or torch.is_grad_enabled())


def status() -> dict[str, dict[str, Any]]:
    """Which library serves each device: ``{"cpu": {"library", "isa", "note"}, "cuda": {"library", "note"}}``."""
    report: dict[str, dict[str, Any]] = {
        device: {"library": None if path is None else str(path), "note": library.notes[device]}
        for device, path in library.libraries.items()
    }
    report["cpu"]["isa"] = library.cpu_isa()
    return report
