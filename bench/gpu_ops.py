"""The ops and the layer on a card: time, bandwidth, and shares of the card's own peaks.

Bandwidth counts the bytes that an op must move (4-bit codes, absmax, output); ``share`` is of the copy bandwidth, or of
the bf16 product, measured at the start of the same part. Rows come one by one, as they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu_measure import Measurement, seconds
from qrosa import ops

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
DENSITIES = (0.003, 0.006)
CROSSING = (0.003, 0.006, 0.01, 0.02, 0.03, 0.045, 0.06, 0.1)
RANK = 16
TOKENS = (2048, 8192)
Row = dict[str, Any]


def quantized(rows: int, columns: int) -> ops.NF4Operands:
    """Random codes with a nested absmax; times do not depend on the values."""
    blocks = -(-rows * columns // 64)
    return ops.NF4Operands(
        torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device="cuda"),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda"),
        torch.linspace(-1, 1, 256, device="cuda"),
        torch.full((-(-blocks // 256),), 0.01, device="cuda"),
        torch.tensor(0.05, device="cuda"),
        64,
    )


def delta(rows: int, columns: int, density: float) -> ops.CsrOperands:
    """A uniformly random sparse delta."""
    mask = torch.rand(rows, columns, device="cuda") < density
    row_ptr = torch.zeros(rows + 1, dtype=torch.int32, device="cuda")
    row_ptr[1:] = mask.sum(1).cumsum(0)
    col = mask.nonzero()[:, 1].to(torch.uint16 if columns <= ops.MAX_UINT16_COLUMNS else torch.int32)
    return ops.CsrOperands(row_ptr, col, torch.randn(col.numel(), device="cuda") * 0.01)


def normal(*shape: int) -> torch.Tensor:
    """Standard normal bf16."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def peer_dequantise(rows: int, columns: int) -> Callable[[], object] | None:
    """bitsandbytes' dequantisation of a matrix of this shape, where it is installed."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return None
    packed, state = bnb.quantize_4bit(normal(rows, columns), quant_type="nf4", compress_statistics=True)
    return lambda: bnb.dequantize_4bit(packed, state)


def dequant_add_rows(peak: dict[str, float], rows: int, columns: int) -> Iterator[Row]:
    """Bandwidth with and without a delta, and against bitsandbytes without one."""
    nf4, out = quantized(rows, columns), torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
    deltas = {f"density {d}": delta(rows, columns, d) for d in DENSITIES}
    runs: dict[str, Callable[[], object]] = {"no delta": lambda: ops.dequant_add(nf4, None, out)}
    for name, csr in deltas.items():
        runs[name] = partial(ops.dequant_add, nf4, csr, out)
    peer = peer_dequantise(rows, columns)
    times = seconds(runs | ({"bitsandbytes": peer} if peer else {}))
    for name, taken in times.items():
        entries = deltas[name].col.numel() if name in deltas else 0
        moved = rows * columns * (0.5 + 1 / 64 + 2) + entries * 6
        share = moved / taken / peak["copy_bytes_per_s"]
        over = {"over_bitsandbytes": taken / times["bitsandbytes"]} if peer else {}
        yield row("dequant_add", rows, columns, name, taken, share) | {"gb_per_s": moved / taken / 1e9} | over


def row(op: str, rows: int, columns: int, case: str, taken: float, share: float) -> Row:
    """One measurement."""
    return {"op": op, "shape": f"{rows}x{columns}", "case": case, "us": taken * 1e6, "share": share}


def sddmm_rows(peak: dict[str, float], rows: int, columns: int, tokens: int) -> Iterator[Row]:
    """Both ways over the densities, with the one that the rule takes, against dense dW and gather."""
    dy, x = normal(tokens, rows), normal(tokens, columns)
    dense = seconds({"dense": lambda: dy.t() @ x})["dense"]
    for density in CROSSING:
        csr = delta(rows, columns, density)
        entry = {"op": "sddmm", "shape": f"{rows}x{columns}", "tokens": tokens, "density": density}
        try:
            for way in ("gather", "tiles", "rule"):
                ops.force_sddmm_way(way)
                run = {way: partial(ops.sddmm, dy, x, csr.row_ptr, csr.col)}
                entry[f"{way}_us"] = seconds(run, rounds=10)[way] * 1e6
        finally:
            ops.force_sddmm_way("rule")
        read = (dy.numel() + x.numel()) * 2 + csr.col.numel() * 6
        entry["share_of_reading_once"] = read / (entry["rule_us"] / 1e6) / peak["copy_bytes_per_s"]
        entry["over_dense_product"] = entry["rule_us"] / 1e6 / dense
        yield entry


def dequant_spmm_rows(peak: dict[str, float], rows: int, columns: int) -> Iterator[Row]:
    """Bandwidth of the packed weight at few tokens, and against dequantising first: where ``linear`` should switch."""
    nf4, csr = quantized(rows, columns), delta(rows, columns, DENSITIES[1])
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")

    def dense_first(x: torch.Tensor) -> object:
        ops.dequant_add(nf4, csr, out)
        return x @ out.t()

    for tokens in (1, 2, 4, 5, 8, 16, 32):
        x = normal(tokens, columns)
        times = seconds(
            {
                "no delta": partial(ops.dequant_spmm, x, nf4, None, rows),
                "delta": partial(ops.dequant_spmm, x, nf4, csr, rows),
                "dequantised first": partial(dense_first, x),
            }
        )
        moved = rows * columns * (0.5 + 1 / 64)
        for name in ("no delta", "delta"):
            share = moved / times[name] / peak["copy_bytes_per_s"]
            over = times[name] / times["dequantised first"]
            measured = row("dequant_spmm", rows, columns, name, times[name], share)
            yield measured | {"tokens": tokens, "over_dequantised_first": over}


def score_rows(peak: dict[str, float], rows: int, columns: int) -> Iterator[Row]:
    """The mask statistic, as a share of the bf16 product."""
    dy, x, stat = normal(TOKENS[0], rows), normal(TOKENS[0], columns), torch.zeros(rows, columns, device="cuda")
    taken = seconds({"score": lambda: ops.score_accumulate(dy, x, stat, True)})["score"]
    flops = 2 * TOKENS[0] * rows * columns / taken
    measured = row("score_accumulate", rows, columns, f"{TOKENS[0]} tokens", taken, flops / peak["bf16_flops"])
    yield measured | {"tflops": flops / 1e12}


def op_measurements(peak: dict[str, float]) -> Iterator[Measurement]:
    """Every op at every shape, each by itself: one that fails leaves the others."""
    products = ((SHAPES[0], TOKENS[0]), (SHAPES[0], TOKENS[1]), (SHAPES[1], TOKENS[0]), (SHAPES[0], 256))
    for shape in SHAPES:
        yield _case("dequant_add", shape), partial(dequant_add_rows, peak, *shape)
    for shape, tokens in products:
        yield _case("sddmm", shape) | {"tokens": tokens}, partial(sddmm_rows, peak, *shape, tokens)
    for shape in SHAPES:
        yield _case("dequant_spmm", shape), partial(dequant_spmm_rows, peak, *shape)
    for shape in SHAPES[:2]:
        yield _case("score_accumulate", shape), partial(score_rows, peak, *shape)


def layer_measurements(peak: dict[str, float]) -> Iterator[Measurement]:
    """The layer at every shape and number of tokens."""
    for shape in SHAPES[:3]:
        for tokens in TOKENS:
            yield _case("layer", shape) | {"tokens": tokens}, partial(layer_rows, peak, *shape, tokens)


def _case(op: str, shape: tuple[int, int]) -> Row:
    return {"op": op, "shape": f"{shape[0]}x{shape[1]}"}


def layer(
    rows: int, columns: int, tokens: int, density: float, dropout: float, rank: int = RANK
) -> Callable[[], object]:
    """Forward and backward of one layer, all gradients."""
    nf4, csr = quantized(rows, columns), delta(rows, columns, density) if density else None
    x, dy = normal(tokens, columns).requires_grad_(), normal(tokens, rows)
    a, b = (normal(rank, columns) * 0.01).requires_grad_(), (normal(rows, rank) * 0.01).requires_grad_()
    wanted = [x, a, b]
    if csr is not None:
        csr = csr._replace(values=csr.values.requires_grad_())
        wanted.append(csr.values)

    def run() -> object:
        y = ops.linear(x, nf4, rows, None, csr, a, b, 1.0, dropout, 7)
        return torch.autograd.grad(y, wanted, dy)

    return run


def layer_rows(peak: dict[str, float], rows: int, columns: int, tokens: int) -> Iterator[Row]:
    """The layer against a dense one (forward and dX), the sparse part's price, and that of a rank that is no eight."""
    x, dy, weight = normal(tokens, columns), normal(tokens, rows), normal(rows, columns)
    times = seconds(
        {
            "dense": lambda: (x @ weight.t(), dy @ weight),
            "plain": layer(rows, columns, tokens, 0.0, 0.0),
            "plain, rank 5": layer(rows, columns, tokens, 0.0, 0.0, 5),
            "plain, rank 8": layer(rows, columns, tokens, 0.0, 0.0, 8),
            "sparse 0.3%": layer(rows, columns, tokens, 0.003, 0.0),
            "sparse 0.6%": layer(rows, columns, tokens, 0.006, 0.0),
            "sparse 0.6%, dropout": layer(rows, columns, tokens, 0.006, 0.05),
        },
        rounds=10,
    )
    for name, taken in times.items():
        share = 4 * tokens * rows * columns / taken / peak["bf16_flops"]
        yield row("layer", rows, columns, name, taken, share) | {
            "tokens": tokens,
            "over_dense": taken / times["dense"],
            "over_plain": taken / times["plain"],
        }
