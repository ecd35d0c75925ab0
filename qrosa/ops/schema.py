"""Every op: its signature, then its fake (the shapes and the checks) beside it.

One contract for all devices: kernels in ``csrc`` and the composition in ``reference.py`` implement exactly these
schemas. The dispatcher takes flat lists of optional tensors; ``Signature.split`` gives them back as the ``NF4Operands``
and ``CsrOperands`` that they come from, so that nobody counts places by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from qrosa.ops.operands import MAX_UINT16_COLUMNS, NESTED_BLOCK, CsrOperands, NF4Operands

LIBRARY = torch.library.Library("qrosa", "DEF")
"""Owner of the op definitions; they live as long as it does."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NF4 = "Tensor codes, Tensor absmax, Tensor? absmax_code, Tensor? absmax_scale, Tensor? absmax_offset, int block_size"
_CSR = "Tensor? row_ptr, Tensor? col, Tensor? values"
_LOW_RANK = "Tensor? a, Tensor? b, float scale, float dropout_p, int seed"
_NEEDS = "bool needs_x, bool needs_values, bool needs_a, bool needs_b"

Fake = TypeVar("Fake", bound=Callable[..., Any])


class Signature:
    """The arguments of one op, which is defined by it.

    Args:
        name: Of the op, without its namespace.
        arguments: As in a schema, separated by commas.
        results: As in a schema.

    Attributes:
        names: The arguments' names, in order.
    """

    def __init__(self, name: str, arguments: str, results: str) -> None:
        LIBRARY.define(f"{name}({arguments}) -> {results}")
        self.names = tuple(argument.split()[-1] for argument in arguments.split(", "))
        self._nf4 = self._start(NF4Operands._fields)
        self._csr = self._start(CsrOperands._fields)

    def _start(self, fields: tuple[str, ...]) -> slice | None:
        """Where a tuple's fields stand in a row."""
        count = len(fields)
        starts = (i for i in range(len(self.names)) if self.names[i : i + count] == fields)
        start = next(starts, None)
        return None if start is None else slice(start, start + count)

    def place(self, name: str) -> int:
        """The place of an argument."""
        return self.names.index(name)

    def split(self, arguments: Sequence[Any]) -> list[Any]:
        """Flat arguments in the same order, a base's as one ``NF4Operands``, a delta's as ``CsrOperands`` or None."""
        parts = list(arguments)
        if self._csr is not None:  # before the base, which stands to its left
            delta = parts[self._csr]
            parts[self._csr] = [None if all(tensor is None for tensor in delta) else CsrOperands(*delta)]
        if self._nf4 is not None:
            parts[self._nf4] = [NF4Operands(*parts[self._nf4])]
        return parts


def _fake(name: str) -> Callable[[Fake], Fake]:
    """Registers a function as the fake of an op: the shapes and types of its results, and the checks."""

    def register(function: Fake) -> Fake:
        torch.library.register_fake(f"qrosa::{name}", function, lib=LIBRARY)
        return function

    return register


def check_nf4(nf4: NF4Operands, rows: int, columns: int) -> None:
    """Checks that the packed base holds rows x columns values."""
    codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size = nf4
    count = rows * columns
    blocks = -(-count // block_size)
    torch._check(block_size >= 2 and block_size & (block_size - 1) == 0, lambda: "block_size must be a power of two")
    torch._check(codes.dtype == torch.uint8, lambda: f"codes must be uint8, got {codes.dtype}")
    torch._check(
        codes.numel() == -(-count // 2),
        lambda: f"codes must hold {-(-count // 2)} bytes for a [{rows}, {columns}] matrix, got {codes.numel()}",
    )
    torch._check(absmax.numel() == blocks, lambda: f"absmax must hold {blocks} blocks, got {absmax.numel()}")
    if absmax_code is None or absmax_scale is None or absmax_offset is None:
        nothing = absmax_code is None and absmax_scale is None and absmax_offset is None
        torch._check(nothing, lambda: "absmax_code, absmax_scale and absmax_offset come together or not at all")
        torch._check(absmax.dtype == torch.float32, lambda: f"a plain absmax must be float32, got {absmax.dtype}")
        return
    torch._check(absmax.dtype == torch.uint8, lambda: f"a nested absmax must be uint8, got {absmax.dtype}")
    torch._check(absmax_code.numel() == 256, lambda: f"absmax_code must hold 256 values, got {absmax_code.numel()}")
    groups = -(-blocks // NESTED_BLOCK)
    torch._check(
        absmax_scale.numel() == groups, lambda: f"absmax_scale must hold {groups} values, got {absmax_scale.numel()}"
    )
    torch._check(absmax_offset.numel() == 1, lambda: "absmax_offset must hold one value")


def check_csr(csr: CsrOperands | None, rows: int, columns: int) -> None:
    """Checks types and sizes of a sparse delta [rows, columns]; its contents are checked where they are used."""
    if csr is None:
        return
    together = all(tensor is not None for tensor in csr)
    torch._check(together, lambda: "row_ptr, col and values come together or not at all")
    _check_positions(csr.row_ptr, csr.col, rows, columns)
    torch._check(
        csr.values.numel() == csr.col.numel(), lambda: f"{csr.values.numel()} values for {csr.col.numel()} columns"
    )


def _check_positions(row_ptr: torch.Tensor, col: torch.Tensor, rows: int, columns: int) -> None:
    expected = torch.uint16 if columns <= MAX_UINT16_COLUMNS else torch.int32
    torch._check(row_ptr.dtype == torch.int32, lambda: f"row_ptr must be int32, got {row_ptr.dtype}")
    torch._check(
        row_ptr.numel() == rows + 1,
        lambda: f"row_ptr must hold {rows + 1} values for {rows} rows, got {row_ptr.numel()}",
    )
    torch._check(col.dtype == expected, lambda: f"col must be {expected} for {columns} columns, got {col.dtype}")


def _check_matrix(name: str, tensor: torch.Tensor) -> None:
    torch._check(tensor.dim() == 2, lambda: f"{name} must be a matrix, got {tensor.dim()} dimensions")
    torch._check(tensor.dtype in _FLOATS, lambda: f"{name} must be bf16, fp16, fp32 or fp64, got {tensor.dtype}")


def _check_pair(dy: torch.Tensor, x: torch.Tensor) -> None:
    _check_matrix("dy", dy)
    _check_matrix("x", x)
    torch._check(dy.shape[0] == x.shape[0], lambda: f"dy has {dy.shape[0]} rows, x has {x.shape[0]}")
    torch._check(dy.dtype == x.dtype, lambda: f"dy is {dy.dtype}, x is {x.dtype}")


def check_linear(
    x: torch.Tensor,
    nf4: NF4Operands,
    out_features: int,
    bias: torch.Tensor | None,
    csr: CsrOperands | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
) -> None:
    """Checks what the whole layer is given."""
    check_nf4(nf4, out_features, x.shape[-1])
    check_csr(csr, out_features, x.shape[-1])
    check_dense(x, out_features, bias, a, b)


def check_dense(
    x: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
) -> None:
    """The part of it that no other op checks once more."""
    columns = x.shape[-1]
    torch._check(x.dtype in _FLOATS, lambda: f"x must be bf16, fp16, fp32 or fp64, got {x.dtype}")
    if a is None or b is None:
        torch._check(a is None and b is None, lambda: "the low-rank part needs both a and b")
    else:
        torch._check(
            a.dim() == 2 and b.dim() == 2 and a.shape[1] == columns and b.shape == (out_features, a.shape[0]),
            lambda: f"a must be [r, {columns}] and b [{out_features}, r], got {list(a.shape)} and {list(b.shape)}",
        )
    if bias is not None:
        torch._check(bias.shape == (out_features,), lambda: f"bias must be [{out_features}], got {list(bias.shape)}")


DEQUANT_ADD = Signature("dequant_add", f"{_NF4}, {_CSR}, Tensor(a!) out", "()")


@_fake("dequant_add")
def _(*args: Any) -> None:
    nf4, csr, out = DEQUANT_ADD.split(args)
    _check_matrix("out", out)
    check_nf4(nf4, *out.shape)
    check_csr(csr, *out.shape)


LIBRARY.define("sddmm(Tensor dy, Tensor x, Tensor row_ptr, Tensor col) -> Tensor")


@_fake("sddmm")
def _(dy: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    _check_pair(dy, x)
    _check_positions(row_ptr, col, dy.shape[1], x.shape[1])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(col.shape, dtype=dtype)


DEQUANT_SPMM = Signature("dequant_spmm", f"Tensor x, {_NF4}, {_CSR}, int out_features", "Tensor")


@_fake("dequant_spmm")
def _(*args: Any) -> torch.Tensor:
    x, nf4, csr, out_features = DEQUANT_SPMM.split(args)
    _check_matrix("x", x)
    check_nf4(nf4, out_features, x.shape[1])
    check_csr(csr, out_features, x.shape[1])
    return x.new_empty((x.shape[0], out_features))  # type: ignore[no-any-return]


DECODE_LINEAR = Signature(
    "decode_linear",
    f"Tensor x, {_NF4}, int out_features, Tensor? bias, {_CSR}, Tensor? a, Tensor? b, float scale",
    "Tensor",
)


@_fake("decode_linear")
def _(*args: Any) -> torch.Tensor:
    x, nf4, out_features, bias, csr, a, b, _scale = DECODE_LINEAR.split(args)
    check_linear(x, nf4, out_features, bias, csr, a, b)
    return x.new_empty((*x.shape[:-1], out_features))  # type: ignore[no-any-return]


# For generation on the CPU, outside of graphs, so without fakes: a layer checked once, then called by its plan.
LIBRARY.define(
    f"decode_plan({_NF4}, int out_features, int in_features, Tensor? bias, {_CSR}, Tensor? a, Tensor? b, float scale) "
    "-> Tensor"
)
LIBRARY.define("decode_planned(Tensor x, Tensor plan) -> Tensor")

LIBRARY.define("score_accumulate(Tensor dy, Tensor x, Tensor(a!) stat, bool square) -> ()")


@_fake("score_accumulate")
def _(dy: torch.Tensor, x: torch.Tensor, stat: torch.Tensor, square: bool) -> None:
    _check_pair(dy, x)
    torch._check(
        stat.shape == (dy.shape[1], x.shape[1]),
        lambda: f"stat must be [{dy.shape[1]}, {x.shape[1]}], got {list(stat.shape)}",
    )


LIBRARY.define("cpu_isa(int request) -> int")  # no tensors, so no fake: asked outside of graphs
LIBRARY.define("sddmm_way(int request) -> int")  # of the CUDA library

LIBRARY.define("dropout(Tensor x, float p, int seed) -> Tensor")


@_fake("dropout")
def _(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    torch._check(0.0 <= p < 1.0, lambda: f"dropout must be in [0, 1), got {p}")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps, float offset, bool rounds) -> (Tensor y, Tensor rstd)")


@_fake("rms_norm")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds: bool) -> tuple[torch.Tensor, ...]:
    check_norm(x, weight)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((x.numel() // max(1, x.shape[-1]),), dtype=dtype)


LIBRARY.define("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset) -> Tensor")


@_fake("rms_norm_backward")
def _(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float) -> torch.Tensor:
    check_norm(x, weight)
    torch._check(dy.shape == x.shape, lambda: f"dy must be {list(x.shape)}, got {list(dy.shape)}")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Checks what a norm is given: x [..., d] and a weight [d] of its type."""
    torch._check(x.dim() >= 1 and x.dtype in _FLOATS, lambda: f"x must be bf16, fp16, fp32 or fp64, got {x.dtype}")
    torch._check(weight.shape == x.shape[-1:], lambda: f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    torch._check(weight.dtype == x.dtype, lambda: f"weight is {weight.dtype}, x is {x.dtype}")


LIBRARY.define("gate(Tensor gate, Tensor up, bool gelu) -> Tensor")


@_fake("gate")
def _(gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    check_gate(gate, up)
    return gate.new_empty(gate.shape)


LIBRARY.define("gate_backward(Tensor dy, Tensor gate, Tensor up, bool gelu) -> (Tensor dgate, Tensor dup)")


@_fake("gate_backward")
def _(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    check_gate(gate, up)
    torch._check(dy.shape == gate.shape, lambda: f"dy must be {list(gate.shape)}, got {list(dy.shape)}")
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def check_gate(gate: torch.Tensor, up: torch.Tensor) -> None:
    """Checks gate and up, matrices of one shape and type."""
    _check_matrix("gate", gate)
    torch._check(gate.shape == up.shape, lambda: f"gate is {list(gate.shape)}, up is {list(up.shape)}")
    torch._check(gate.dtype == up.dtype, lambda: f"gate is {gate.dtype}, up is {up.dtype}")


_LAYER = f"Tensor x, {_NF4}, int out_features, Tensor? bias, {_CSR}, {_LOW_RANK}"
_LAYER_BACKWARD = f"Tensor dy, Tensor x, Tensor projected, {_NF4}, {_CSR}, {_LOW_RANK}, {_NEEDS}"

LINEAR = Signature("linear", _LAYER, "(Tensor y, Tensor projected)")


@_fake("linear")
def _(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, nf4, out_features, bias, csr, a, b, *_ = LINEAR.split(args)
    check_linear(x, nf4, out_features, bias, csr, a, b)
    projected = x.new_empty((x.numel() // x.shape[-1], a.shape[0]) if a is not None else (0,))
    return x.new_empty((*x.shape[:-1], out_features)), projected


LINEAR_BACKWARD = Signature(
    "linear_backward",
    f"{_LAYER_BACKWARD}, bool needs_bias",
    "(Tensor dx, Tensor dvalues, Tensor da, Tensor db, Tensor dbias)",
)


@_fake("linear_backward")
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    dy, x, _projected, _nf4, csr, a, b, _scale, _p, _seed, *needs, needs_bias = LINEAR_BACKWARD.split(args)
    return (*_gradients(x, csr, a, b, needs), dy.new_empty((dy.shape[-1],) if needs_bias else (0,)))


LINEAR_TILES = Signature("linear_tiles", _LAYER, "(Tensor y, Tensor projected)")
# On CPUs with matrix tiles: bf16, x [T, K] with T > 0, K a multiple of 64, an fp32 bias, a and b in bf16.


@_fake("linear_tiles")
def _(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, nf4, out_features, bias, csr, a, b, *_ = LINEAR_TILES.split(args)
    _check_matrix("x", x)
    check_linear(x, nf4, out_features, bias, csr, a, b)
    return x.new_empty((x.shape[0], out_features)), x.new_empty((x.shape[0], a.shape[0]) if a is not None else (0,))


LINEAR_TILES_BACKWARD = Signature(
    "linear_tiles_backward", _LAYER_BACKWARD, "(Tensor dx, Tensor dvalues, Tensor da, Tensor db)"
)


@_fake("linear_tiles_backward")
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    dy, x, _projected, nf4, csr, a, b, _scale, _p, _seed, *needs = LINEAR_TILES_BACKWARD.split(args)
    _check_pair(dy, x)
    check_nf4(nf4, dy.shape[1], x.shape[1])
    check_csr(csr, dy.shape[1], x.shape[1])
    return tuple(_gradients(x, csr, a, b, needs))


def _gradients(
    x: torch.Tensor, csr: CsrOperands | None, a: torch.Tensor | None, b: torch.Tensor | None, needs: list[bool]
) -> list[torch.Tensor]:
    """Gradients of x, values, a and b; empty where one is not needed, or there is nothing to have one."""
    inputs = (x, None if csr is None else csr.values, a, b)
    return [
        torch.empty_like(like, memory_format=torch.contiguous_format) if need and like is not None else x.new_empty(0)
        for like, need in zip(inputs, needs, strict=True)
    ]
