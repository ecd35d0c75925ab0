"""Every op: its schema, then its fake (the shapes and the checks) beside it.

One contract for all devices: kernels in ``csrc`` and the composition in ``reference.py`` implement exactly these
schemas. The flat lists of optional tensors come from ``NF4Operands`` and ``CsrOperands``.
"""

from __future__ import annotations

import torch

from qrosa.ops.operands import MAX_UINT16_COLUMNS, NESTED_BLOCK

LIBRARY = torch.library.Library("qrosa", "DEF")
"""Owner of the op definitions; they live as long as it does."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NF4 = "Tensor codes, Tensor absmax, Tensor? absmax_code, Tensor? absmax_scale, Tensor? absmax_offset, int block_size"
_CSR = "Tensor? row_ptr, Tensor? col, Tensor? values"
_LOW_RANK = "Tensor? a, Tensor? b, float scale, float dropout_p, int seed"

OptionalTensor = torch.Tensor | None


def check_nf4(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    absmax_code: OptionalTensor,
    absmax_scale: OptionalTensor,
    absmax_offset: OptionalTensor,
    block_size: int,
    rows: int,
    columns: int,
) -> None:
    """Checks that the packed base holds rows x columns values."""
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


def check_csr(row_ptr: OptionalTensor, col: OptionalTensor, values: OptionalTensor, rows: int, columns: int) -> None:
    """Checks types and sizes of a sparse delta [rows, columns]; its contents are checked where they are used."""
    if row_ptr is None or col is None:
        torch._check(row_ptr is None and col is None, lambda: "row_ptr and col come together or not at all")
        return
    expected = torch.uint16 if columns <= MAX_UINT16_COLUMNS else torch.int32
    torch._check(row_ptr.dtype == torch.int32, lambda: f"row_ptr must be int32, got {row_ptr.dtype}")
    torch._check(
        row_ptr.numel() == rows + 1,
        lambda: f"row_ptr must hold {rows + 1} values for {rows} rows, got {row_ptr.numel()}",
    )
    torch._check(col.dtype == expected, lambda: f"col must be {expected} for {columns} columns, got {col.dtype}")
    if values is not None:
        torch._check(values.numel() == col.numel(), lambda: f"{values.numel()} values for {col.numel()} columns")


def _check_matrix(name: str, tensor: torch.Tensor) -> None:
    torch._check(tensor.dim() == 2, lambda: f"{name} must be a matrix, got {tensor.dim()} dimensions")
    torch._check(tensor.dtype in _FLOATS, lambda: f"{name} must be bf16, fp16, fp32 or fp64, got {tensor.dtype}")


def _check_pair(dy: torch.Tensor, x: torch.Tensor) -> None:
    _check_matrix("dy", dy)
    _check_matrix("x", x)
    torch._check(dy.shape[0] == x.shape[0], lambda: f"dy has {dy.shape[0]} rows, x has {x.shape[0]}")
    torch._check(dy.dtype == x.dtype, lambda: f"dy is {dy.dtype}, x is {x.dtype}")


LIBRARY.define(f"dequant_add({_NF4}, {_CSR}, Tensor(a!) out) -> ()")


@torch.library.register_fake("qrosa::dequant_add", lib=LIBRARY)
def _(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, row_ptr, col, values, out):  # type: ignore[no-untyped-def]
    _check_matrix("out", out)
    rows, columns = out.shape
    check_nf4(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, rows, columns)
    check_csr(row_ptr, col, values, rows, columns)


LIBRARY.define("sddmm(Tensor dy, Tensor x, Tensor row_ptr, Tensor col) -> Tensor")


@torch.library.register_fake("qrosa::sddmm", lib=LIBRARY)
def _(dy, x, row_ptr, col):  # type: ignore[no-untyped-def]
    _check_pair(dy, x)
    check_csr(row_ptr, col, None, dy.shape[1], x.shape[1])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(col.shape, dtype=dtype)


LIBRARY.define(f"dequant_spmm(Tensor x, {_NF4}, {_CSR}, int out_features) -> Tensor")


@torch.library.register_fake("qrosa::dequant_spmm", lib=LIBRARY)
def _(x, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, row_ptr, col, values, out_features):  # type: ignore[no-untyped-def]
    _check_matrix("x", x)
    check_nf4(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, out_features, x.shape[1])
    check_csr(row_ptr, col, values, out_features, x.shape[1])
    return x.new_empty((x.shape[0], out_features))


LIBRARY.define(
    f"decode_linear(Tensor x, {_NF4}, int out_features, Tensor? bias, {_CSR}, Tensor? a, Tensor? b, float scale) "
    "-> Tensor"
)


@torch.library.register_fake("qrosa::decode_linear", lib=LIBRARY)
def _(  # type: ignore[no-untyped-def]
    x, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, out_features,
    bias, row_ptr, col, values, a, b, scale,
):  # fmt: skip
    check_linear(x, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, out_features,
                 bias, row_ptr, col, values, a, b)  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


# For generation on the CPU, outside of graphs, so without fakes: a layer checked once, then called by its plan.
LIBRARY.define(
    f"decode_plan({_NF4}, int out_features, int in_features, Tensor? bias, {_CSR}, Tensor? a, Tensor? b, float scale) "
    "-> Tensor"
)
LIBRARY.define("decode_planned(Tensor x, Tensor plan) -> Tensor")

LIBRARY.define("score_accumulate(Tensor dy, Tensor x, Tensor(a!) stat, bool square) -> ()")


@torch.library.register_fake("qrosa::score_accumulate", lib=LIBRARY)
def _(dy, x, stat, square):  # type: ignore[no-untyped-def]
    _check_pair(dy, x)
    torch._check(
        stat.shape == (dy.shape[1], x.shape[1]),
        lambda: f"stat must be [{dy.shape[1]}, {x.shape[1]}], got {list(stat.shape)}",
    )


LIBRARY.define("cpu_isa(int request) -> int")  # no tensors, so no fake: asked outside of graphs

LIBRARY.define("dropout(Tensor x, float p, int seed) -> Tensor")


@torch.library.register_fake("qrosa::dropout", lib=LIBRARY)
def _(x, p, seed):  # type: ignore[no-untyped-def]
    torch._check(0.0 <= p < 1.0, lambda: f"dropout must be in [0, 1), got {p}")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


LIBRARY.define(
    f"linear(Tensor x, {_NF4}, int out_features, Tensor? bias, {_CSR}, {_LOW_RANK}) -> (Tensor y, Tensor projected)"
)


@torch.library.register_fake("qrosa::linear", lib=LIBRARY)
def _(  # type: ignore[no-untyped-def]
    x, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, out_features,
    bias, row_ptr, col, values, a, b, scale, dropout_p, seed,
):  # fmt: skip
    check_linear(x, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, out_features,
                 bias, row_ptr, col, values, a, b)  # fmt: skip
    projected = x.new_empty((x.numel() // x.shape[-1], a.shape[0]) if a is not None else (0,))
    return x.new_empty((*x.shape[:-1], out_features)), projected


def check_linear(  # type: ignore[no-untyped-def]
    x, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, out_features,
    bias, row_ptr, col, values, a, b,
) -> None:  # fmt: skip
    """Checks what the whole layer is given."""
    columns = x.shape[-1]
    torch._check(x.dtype in _FLOATS, lambda: f"x must be bf16, fp16, fp32 or fp64, got {x.dtype}")
    check_nf4(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, out_features, columns)
    check_csr(row_ptr, col, values, out_features, columns)
    torch._check((row_ptr is None) == (values is None), lambda: "a sparse delta needs its values")
    torch._check((a is None) == (b is None), lambda: "the low-rank part needs both a and b")
    if a is not None:
        torch._check(
            a.dim() == 2 and b.dim() == 2 and a.shape[1] == columns and b.shape == (out_features, a.shape[0]),
            lambda: f"a must be [r, {columns}] and b [{out_features}, r], got {list(a.shape)} and {list(b.shape)}",
        )
    if bias is not None:
        torch._check(bias.shape == (out_features,), lambda: f"bias must be [{out_features}], got {list(bias.shape)}")


LIBRARY.define(
    f"linear_backward(Tensor dy, Tensor x, Tensor projected, {_NF4}, {_CSR}, {_LOW_RANK}, bool[] needs) "
    "-> (Tensor dx, Tensor dvalues, Tensor da, Tensor db, Tensor dbias)"
)


@torch.library.register_fake("qrosa::linear_backward", lib=LIBRARY)
def _(  # type: ignore[no-untyped-def]
    dy, x, projected, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size,
    row_ptr, col, values, a, b, scale, dropout_p, seed, needs,
):  # fmt: skip
    shapes = (x, values, a, b)
    gradients = [
        torch.empty_like(like, memory_format=torch.contiguous_format) if need else x.new_empty((0,))
        for like, need in zip(shapes, needs, strict=False)
    ]
    return (*gradients, dy.new_empty((dy.shape[-1],)) if needs[4] else x.new_empty((0,)))


LIBRARY.define(
    f"linear_tiles(Tensor x, {_NF4}, int out_features, Tensor? bias, {_CSR}, {_LOW_RANK}) "
    "-> (Tensor y, Tensor projected)"
)
# On CPUs with matrix tiles: bf16, x [T, K] with T > 0, K a multiple of 64, an fp32 bias, a and b in bf16.


@torch.library.register_fake("qrosa::linear_tiles", lib=LIBRARY)
def _(  # type: ignore[no-untyped-def]
    x, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, out_features,
    bias, row_ptr, col, values, a, b, scale, dropout_p, seed,
):  # fmt: skip
    _check_matrix("x", x)
    check_linear(x, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, out_features,
                 bias, row_ptr, col, values, a, b)  # fmt: skip
    return x.new_empty((x.shape[0], out_features)), x.new_empty((x.shape[0], a.shape[0]) if a is not None else (0,))


LIBRARY.define(
    f"linear_tiles_backward(Tensor dy, Tensor x, Tensor projected, {_NF4}, {_CSR}, {_LOW_RANK}, "
    "bool needs_x, bool needs_values, bool needs_a, bool needs_b) "
    "-> (Tensor dx, Tensor dvalues, Tensor da, Tensor db)"
)


@torch.library.register_fake("qrosa::linear_tiles_backward", lib=LIBRARY)
def _(  # type: ignore[no-untyped-def]
    dy, x, projected, codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size,
    row_ptr, col, values, a, b, scale, dropout_p, seed, needs_x, needs_values, needs_a, needs_b,
):  # fmt: skip
    _check_pair(dy, x)
    check_nf4(codes, absmax, absmax_code, absmax_scale, absmax_offset, block_size, dy.shape[1], x.shape[1])
    check_csr(row_ptr, col, values, dy.shape[1], x.shape[1])
    wanted = ((x, needs_x), (values, needs_values), (a, needs_a), (b, needs_b))
    return tuple(
        like.new_empty(like.shape) if need and like is not None else x.new_empty((0,)) for like, need in wanted
    )
