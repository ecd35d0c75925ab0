"""Every instantiation of every kernel on small inputs, held against the reference; shapes are multiples of nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from op_inputs import ROUNDING, SUM_ERROR, close, delta, matrix, quantized
from ptx_session import Session, ceil_div, csr_view, flag, int32, int64, nf4_view, operands

from qrosa.ops import CsrOperands, reference
from qrosa.ops.dropout import dropout, keys, threshold

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Shape = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A named run of one or more kernels that checks its own results."""

    name: str
    run: Callable[..., None]


def dequant_add(
    session: Session, shape: Shape, dtype: torch.dtype, density: float, nested: bool = True, shift: int = 0
) -> None:
    """deq(Wq) + S, bit for bit; ``shift`` takes the vector path away."""
    nf4, csr = quantized(*shape, nested)[0], delta(*shape, density) if density else None
    count = shape[0] * shape[1]
    out = session.room("out", count, dtype, shift)
    views = nf4_view(session, nf4), csr_view(session, csr)
    grid = (ceil_div(count, 8 * 1024), 1, 1)
    session.start(
        session.kernel("dequant_add_kernel", dtype),
        grid,
        *views,
        int64(out),
        int64(shape[0]),
        int64(shape[1]),
        flag(not shift),
    )
    expected = reference.effective_weight(nf4, csr, shape, dtype).flatten()
    assert torch.equal(session.result(out, count, dtype), expected)


def spmm(
    session: Session, kind: str, tokens: int, shape: Shape, dtype: torch.dtype, size: int = 0, density: float = 0.05
) -> None:
    """x (deq(Wq) + S)^T by one of three kernels: ``rows`` and ``tensor`` of ``size``, or ``any``."""
    rows, columns = shape
    nf4, csr, x = (
        quantized(*shape, True)[0],
        delta(*shape, density) if density else None,
        matrix(tokens, columns, dtype),
    )
    y = session.room("y", tokens * rows, dtype)
    decode = nf4_view(session, nf4) + csr_view(session, csr) + int64(session.add("x", x), y, tokens, rows, columns)
    of_rows, of_tokens = {"rows": (16, size), "tensor": (16, 8 * size), "any": (8, 4)}[kind]
    kernel = session.kernel(f"spmm_{kind}_kernel", dtype, size)
    session.start(kernel, (ceil_div(rows, of_rows), ceil_div(tokens, of_tokens), 1), decode)
    exact = reference.dequant_spmm(x.double(), nf4, csr, rows)
    got = session.result(y, tokens * rows, dtype).view(tokens, rows)
    close(got, exact, dtype, columns, 2.0 + 2.0**-17 / SUM_ERROR)


def _gradients(session: Session, tokens: int, shape: Shape, dtype: torch.dtype, density: float, shift: int):  # type: ignore[no-untyped-def]
    csr = delta(*shape, density)
    dy, x = matrix(tokens, shape[0], dtype, 1), matrix(tokens, shape[1], dtype, 2)
    exact = reference.sddmm(dy.double(), x.double(), csr.row_ptr, csr.col)
    return csr, operands(session, dy, x, shift), exact


def gather(
    session: Session,
    tokens: int,
    shape: Shape,
    dtype: torch.dtype,
    density: float,
    cut: tuple[int, int, int],
    shift: int = 0,
) -> None:
    """The sparse gradient by gathering; ``cut`` is columns of a part, token groups and row parts (GatherPlan)."""
    csr, pair, exact = _gradients(session, tokens, shape, dtype, density, shift)
    (rows, columns), (part, groups, row_parts), nnz = shape, cut, csr.col.numel()
    parts, tiles, chunks = ceil_div(columns, part), ceil_div(rows, 256), ceil_div(tokens, 64)
    groups, row_tiles = min(groups, chunks), ceil_div(tiles, row_parts)
    row_parts = ceil_div(tiles, row_tiles)
    view = csr_view(session, csr)
    listed = [session.room(name, parts * tiles * size, torch.int32) for name, size in _LISTS]
    sums, out = session.room("sums", groups * nnz, FP32), session.room("out", nnz, FP32)
    index, plan = int64(*listed), int32(parts, part, groups, chunks, row_parts, row_tiles, tiles)
    session.start(
        session.kernel("gather_index_kernel"),
        (parts * tiles, 1, 1),
        view,
        index,
        int64(rows),
        int32(part),
        int32(tiles),
    )
    session.start(
        session.kernel("gather_kernel", dtype), (parts, groups, row_parts), pair, view, index, plan, int64(sums),
        shared=(part + 256) * 128,
    )  # fmt: skip
    session.start(
        session.kernel("gather_sum_kernel"),
        (ceil_div(nnz, 256), 1, 1),
        int64(sums),
        int64(out),
        int64(nnz),
        int32(groups),
    )
    close(session.result(out, nnz, FP32), exact, FP32, tokens)


_LISTS = (("before", 256), ("shift", 256), ("total", 1))


def tiles(session: Session, tokens: int, shape: Shape, dtype: torch.dtype, density: float, shift: int = 0) -> None:
    """The sparse gradient by dense tiles."""
    csr, pair, exact = _gradients(session, tokens, shape, dtype, density, shift)
    out = session.room("out", csr.col.numel(), FP32)
    kernel = session.kernel("sddmm_wide_kernel") if dtype == FP32 else session.kernel("sddmm_tile_kernel", dtype)
    session.start(kernel, _tiles_of(shape, dtype), pair, csr_view(session, csr), int64(out))
    close(session.result(out, csr.col.numel(), FP32), exact, FP32, tokens)


def score(session: Session, tokens: int, shape: Shape, dtype: torch.dtype, square: bool, shift: int = 0) -> None:
    """stat += dY^T X, squared or not."""
    rows, columns = shape
    dy, x = matrix(tokens, rows, dtype, 1), matrix(tokens, columns, dtype, 2)
    stat = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    place = session.memory.room("stat", stat.numel() * 4, 0, stat.numpy())
    kernel = session.kernel("score_wide_kernel") if dtype == FP32 else session.kernel("score_kernel", dtype)
    statistic = struct.pack("<Q??6x", place, square, columns % 2 == 0)
    session.start(kernel, _tiles_of(shape, dtype), operands(session, dy, x, shift), statistic)
    product = dy.double().t() @ x.double()
    exact = stat.double() + (product * product if square else product)
    size = 2.0 * (product.abs().max().item() + 1.0) if square else 1.0  # d(p^2) = 2 p dp
    close(session.result(place, stat.numel(), FP32).view(shape), exact, FP32, tokens, size)


def _tiles_of(shape: Shape, dtype: torch.dtype) -> tuple[int, int, int]:
    side = 64 if dtype == FP32 else 128
    return ceil_div(shape[1], side), ceil_div(shape[0], side), 1


def drop(session: Session, count: int, dtype: torch.dtype, shift: int = 0) -> None:
    """Dropout, bit for bit."""
    p, seed, x = 0.3, 12345, matrix(1, count, dtype)
    out, source = session.room("out", count, dtype, shift), session.add("x", x, shift)
    arguments = (
        int64(count),
        struct.pack("<2I", *keys(seed)),
        struct.pack("<I", threshold(p)),
        struct.pack("<f", 1 / (1 - p)),
    )
    grid = (ceil_div(count, 256 * 16 // dtype.itemsize), 1, 1)
    session.start(session.kernel("dropout_kernel", dtype), grid, int64(source), int64(out), *arguments, flag(not shift))
    assert torch.equal(session.result(out, count, dtype), dropout(x, p, seed).flatten())


def norm(session: Session, shape: Shape, dtype: torch.dtype, offset: float = 0.0, shift: int = 0) -> None:
    """RMSNorm and its gradient, a row a warp or a row a block."""
    (rows, width), rounds = shape, offset == 0.0
    x, dy, weight = matrix(rows, width, dtype, 1), matrix(rows, width, dtype, 2), matrix(1, width, dtype, 3)[0]
    inputs = [session.add(name, t, shift) for name, t in (("x", x), ("weight", weight), ("dy", dy))]
    rstd = session.room("rstd", rows, FP32)
    y, dx = (session.room(name, rows * width, dtype, shift) for name in ("y", "dx"))
    threads = 32 if width * dtype.itemsize <= 2048 else 256
    vector = flag(shift == 0 and width * dtype.itemsize % 16 == 0)
    grid = (ceil_div(rows, 256 // threads), 1, 1)
    for name, gradient, out in (("rms_norm", 0, y), ("rms_norm_backward", inputs[2], dx)):
        work = struct.pack("<5Q2q2f?7x", *inputs[:2], gradient, rstd, out, rows, width, 1e-5, offset, rounds)
        session.start(session.kernel(f"{name}_kernel", dtype, threads), grid, work, vector)
    exact, scale = reference.rms_norm(x.double(), weight.double(), 1e-5, offset, False)
    close(session.result(rstd, rows, FP32), scale, FP32, width)
    _rounded_once(session.result(y, rows * width, dtype).view(shape), exact, dtype, 2 if rounds else 1, width)
    expected = reference.rms_norm_backward(dy.double(), x.double(), weight.double(), scale, offset)
    _rounded_once(session.result(dx, rows * width, dtype).view(shape), expected, dtype, 1, width)


def _rounded_once(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, roundings: int, terms: int) -> None:
    """So many roundings of a result that hangs on fp32 sums, whose errors are 2^-22 a term of size 8 at most."""
    bound = ROUNDING[dtype] * (1.02 * roundings * exact.abs() + 2.0**-14) + 8.0 * SUM_ERROR * terms**0.5
    assert ((got.double() - exact).abs() <= bound).all()


def gated(session: Session, shape: Shape, dtype: torch.dtype, gelu: bool, joined: bool = False, shift: int = 0) -> None:
    """act(gate) up and its gradients; ``joined``: both are halves of wider rows."""
    rows, columns = shape
    both = matrix(rows, 2 * columns, dtype, 1) * 3
    dy = matrix(rows, columns, dtype, 2)
    halves = [half.contiguous() for half in both.chunk(2, -1)]
    if joined:
        gate_at = session.add("both", both, shift)
        places, stride = (gate_at, gate_at + columns * dtype.itemsize), 2 * columns
    else:
        places, stride = (
            [session.add(name, half, shift) for name, half in zip(("gate", "up"), halves, strict=True)],
            columns,
        )
    gradient = session.add("dy", dy, shift)
    y, dgate, dup = (session.room(name, rows * columns, dtype, shift) for name in ("y", "dgate", "dup"))
    of_rows, of_columns = (rows, columns) if joined else (1, rows * columns)
    stride = stride if joined else of_columns
    vector = flag(shift == 0 and columns * dtype.itemsize % 16 == 0)
    grid = (ceil_div(of_columns, 256 * 16 // dtype.itemsize), of_rows, 1)
    for name, given, outputs in (("gate", 0, (y, 0)), ("gate_backward", gradient, (dgate, dup))):
        work = struct.pack("<5Q4q?7x", *places, given, *outputs, of_rows, of_columns, stride, stride, gelu)
        session.start(session.kernel(f"{name}_kernel", dtype), grid, work, vector)
    wide = [half.double() for half in halves]
    expected = reference.gate(*wide, gelu), *reference.gate_backward(dy.double(), *wide, gelu)
    for place, exact, roundings in zip((y, dgate, dup), expected, (2, 1, 1), strict=True):
        _rounded_once(session.result(place, rows * columns, dtype).view(shape), exact, dtype, roundings, 64)


def damaged(session: Session) -> None:
    """Row pointers and columns that point anywhere: any result, no access outside."""
    shape, random = (40, 96), torch.Generator().manual_seed(1)
    nf4, whole = quantized(*shape, True)[0], delta(*shape, 0.05)
    row_ptr, col = whole.row_ptr.clone(), whole.col.to(torch.int32)
    places = torch.randint(0, 41, (6,), generator=random)
    row_ptr[places] = torch.randint(-(2**31), 2**31 - 1, (6,), generator=random).to(torch.int32)
    col[torch.randint(0, col.numel(), (8,), generator=random)] = 60000
    csr = CsrOperands(row_ptr, col.to(torch.uint16), whole.values)
    view, decoded, y = csr_view(session, csr), session.room("out", 40 * 96, BF16), session.room("y", 5 * 40, BF16)
    base = nf4_view(session, nf4)
    shape_bytes = int64(40), int64(96), flag(True)
    session.start(session.kernel("dequant_add_kernel", BF16), (1, 1, 1), base, view, int64(decoded), *shape_bytes)
    x = session.add("x", matrix(5, 96, BF16))
    for kind, size in (("rows", 4), ("tensor", 1)):
        decode = base + view + int64(x, y, 5, 40, 96)
        session.start(session.kernel(f"spmm_{kind}_kernel", BF16, size), (3, 2 if kind == "rows" else 1, 1), decode)
    pair = operands(session, matrix(64, 40, BF16), matrix(64, 96, BF16))
    out = session.room("gradient", csr.col.numel(), FP32)
    session.start(session.kernel("sddmm_tile_kernel", BF16), (1, 1, 1), pair, view, int64(out))
    for machine in session.machines:  # rows that overlap are written twice, which is a race and not a fault here
        machine.found.clear()


def _cases() -> dict[str, Callable[..., None]]:
    found: dict[str, Callable[..., None]] = {"damaged": damaged}
    for name, dtype in (("bf16", BF16), ("fp16", FP16), ("fp32", FP32)):
        found[f"dequant_add {name}"] = partial(dequant_add, shape=(20, 1000), dtype=dtype, density=0.05)
        found[f"dequant_add {name} unaligned"] = partial(
            dequant_add, shape=(7, 33), dtype=dtype, density=0.3, nested=False, shift=3
        )
        found[f"dropout {name}"] = partial(drop, count=4501, dtype=dtype)
        found[f"norm {name}"] = partial(norm, shape=(9, 576), dtype=dtype, offset=1.0)
        found[f"norm {name} wide"] = partial(norm, shape=(3, 2304), dtype=dtype)
        found[f"norm {name} unaligned"] = partial(norm, shape=(2, 67), dtype=dtype, shift=1)
        found[f"norm {name} wide unaligned"] = partial(norm, shape=(2, 1301), dtype=dtype, shift=1)
        found[f"gate {name}"] = partial(gated, shape=(5, 712), dtype=dtype, gelu=False)
        found[f"gate {name} joined"] = partial(gated, shape=(3, 200), dtype=dtype, gelu=True, joined=True)
        found[f"gate {name} unaligned"] = partial(gated, shape=(3, 67), dtype=dtype, gelu=True, shift=1)
        found[f"dropout {name} unaligned"] = partial(drop, count=901, dtype=dtype, shift=1)
        for size, tokens, columns in ((1, 1, 2208), (2, 2, 96), (4, 3, 1056)):
            found[f"spmm_rows {name} {size}"] = partial(
                spmm, kind="rows", tokens=tokens, shape=(19, columns), dtype=dtype, size=size
            )
        found[f"spmm_any {name}"] = partial(spmm, kind="any", tokens=5, shape=(9, 33), dtype=dtype)
        found[f"score {name}"] = partial(score, tokens=70, shape=(136, 72), dtype=dtype, square=True)
        found[f"score {name} unaligned"] = partial(score, tokens=19, shape=(70, 67), dtype=dtype, square=False, shift=1)
        found[f"tiles {name}"] = partial(tiles, tokens=100, shape=(40, 136), dtype=dtype, density=0.1)
        found[f"tiles {name} unaligned"] = partial(
            tiles, tokens=33, shape=(130, 65), dtype=dtype, density=0.05, shift=1
        )
    for name, dtype in (("bf16", BF16), ("fp16", FP16)):
        for size, tokens, columns in ((1, 5, 96), (2, 21, 1184)):
            found[f"spmm_tensor {name} {size}"] = partial(
                spmm, kind="tensor", tokens=tokens, shape=(21, columns), dtype=dtype, size=size
            )
        found[f"gather {name}"] = partial(
            gather, tokens=130, shape=(300, 136), dtype=dtype, density=0.03, cut=(128, 2, 1)
        )
        found[f"gather {name} unaligned"] = partial(
            gather, tokens=65, shape=(40, 72), dtype=dtype, density=0.05, cut=(64, 1, 1), shift=1
        )
    return found


CASES = [Case(name, run) for name, run in _cases().items()]
