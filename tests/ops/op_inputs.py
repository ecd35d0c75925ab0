"""Inputs for the op tests: matrices quantised by bitsandbytes, sparse deltas, and tolerances derived from the dtype."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import strategies as st

from qrosa.ops import MAX_UINT16_COLUMNS, NF4_TABLE, CsrOperands, NF4Operands

ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# The unit roundoff of each type (2^-8 for bf16's 8 bits): what one rounding may cost, relative to the result.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SUM_ERROR = 2.0**-22  # of an fp32 sum of products, per term and unit of the terms' size (see close())

FEW_ROWS = (
    (1, 67, 64),  # one row of x, one block a row of the weight; of the weight's rows, three are left over by fours
    (2, 96, 192),  # two rows of x, an odd number of blocks
    (3, 67, 576),  # three: the weight's rows go by twos, one is left over
    (4, 66, 1536),  # four, the most that go together
    (7, 67, 2048),  # four and three
    (9, 96, 1088),  # twice four and one
)
"""(T, N, K) at which the ways through the kernels for few rows of x part; what lies between, hypothesis draws."""

sizes = st.sampled_from((1, 2, 3, 5, 7, 16, 31, 33, 63, 64, 65, 96, 127, 130))
tokens = st.sampled_from((0, 1, 2, 3, 17, 33, 64, 70))
densities = st.sampled_from((0.0, 0.01, 0.1, 1.0))
seeds = st.integers(0, 2**31 - 1)


def quantized(rows: int, columns: int, nested: bool, seed: int = 0) -> tuple[NF4Operands, torch.Tensor, bnb.QuantState]:
    """A random [rows, columns] matrix in NF4: our operands, and bitsandbytes' packed tensor and state."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    if not nested:
        return NF4Operands(packed.flatten(), state.absmax, None, None, None, 64), packed, state
    second = state.state2
    return NF4Operands(packed.flatten(), state.absmax, second.code, second.absmax, state.offset, 64), packed, state


def bnb_dense(packed: torch.Tensor, state: bnb.QuantState, dtype: torch.dtype) -> torch.Tensor:
    """What bitsandbytes dequantises to.

    Its AVX-512 kernel reads the wrong block where a row is a multiple of 16 but not of the block size, so those shapes
    are taken from its plain implementation, which its other backends follow.
    """
    columns = state.shape[-1]
    state.dtype = dtype
    if columns % 16 == 0 and columns % 64 != 0:
        absmax = state.absmax
        if state.nested:
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
        return _dequantize_4bit_compute(packed.flatten(), absmax, torch.tensor(NF4_TABLE), 64, state.shape, dtype)
    return bnb.dequantize_4bit(packed, state)


def delta(rows: int, columns: int, density: float, seed: int = 0) -> CsrOperands:
    """A sparse delta with about ``density`` of the positions, some rows empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    mask[::3] &= density == 1.0
    row_ptr = torch.zeros(rows + 1, dtype=torch.int32)
    row_ptr[1:] = mask.sum(1).cumsum(0)
    col = mask.nonzero()[:, 1].to(torch.uint16 if columns <= MAX_UINT16_COLUMNS else torch.int32)
    return CsrOperands(row_ptr, col, torch.randn(col.numel(), generator=generator) * 0.1)


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, terms: int, size: float = 1.0) -> None:
    """Asserts |got - exact| <= one rounding to ``dtype`` + the error of an fp32 sum of ``terms`` products.

    A product of two standard normal numbers is of size 1. Summing n of them in one chain adds n roundings of partial
    sums of size sqrt(n), which together come to some n * 2^-24; SUM_ERROR leaves a factor of four for the tails, and
    several chains only do better. ``size`` scales the terms.
    """
    if not exact.numel():
        assert got.shape == exact.shape
        return
    bound = ROUNDING[dtype] * exact.abs() * 1.01 + SUM_ERROR * size * max(terms, 1) + 2.0**-24
    excess = ((got.double() - exact.double()).abs() - bound).max().item()
    assert excess <= 0, f"off by {excess:.3g} more than the bound"
