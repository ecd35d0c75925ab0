"""Few rows against the packed weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_inputs import FEW_ROWS, FLOATS, ROUNDING, close, delta, densities, matrix, quantized, seeds, sizes, tokens

from qrosa import ops
from qrosa.ops import reference

isa_is_fixed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(
    rows: int, n: int, k: int, density: float | None, dtype: torch.dtype, nested: bool = True, seed: int = 0
) -> None:
    nf4, _, _ = quantized(n, k, nested, seed)
    csr = None if density is None else delta(n, k, density, seed)
    x = matrix(rows, k, dtype, seed + 1)  # not the seed that the weight was drawn from
    got = ops.dequant_spmm(x, nf4, csr, n)
    assert got.dtype == dtype
    exact = reference.dequant_spmm(x.double(), nf4, csr, n)
    # Weights and x are of size 1; a weight is itself a rounded product, which doubles the error of a term.
    close(got, exact, dtype, k, size=2.0)


@isa_is_fixed
@given(
    rows=tokens, n=sizes, k=sizes, density=densities, dtype=st.sampled_from(FLOATS), nested=st.booleans(), seed=seeds
)
def test_equals_the_fp64_reference(
    isa: str, rows: int, n: int, k: int, density: float, dtype: torch.dtype, nested: bool, seed: int
) -> None:
    check(rows, n, k, density, dtype, nested, seed)


@pytest.mark.parametrize("shape", FEW_ROWS)
def test_real_widths(isa: str, shape: tuple[int, int, int]) -> None:
    for dtype in FLOATS:
        check(*shape, 0.01, dtype)
        check(*shape, None, dtype, nested=False)


def test_the_weight_is_not_rounded_to_bf16(isa: str) -> None:
    nf4, _, _ = quantized(64, 512, nested=True)
    x = matrix(1, 512, torch.bfloat16)
    exact = reference.dequant_spmm(x.double(), nf4, None, 64)
    got = ops.dequant_spmm(x, nf4, None, 64)
    rounded = x.double() @ reference.effective_weight(nf4, None, (64, 512), torch.bfloat16).double().t()
    assert (got - exact).abs().mean() <= (rounded.to(torch.bfloat16) - exact).abs().mean() * 1.05
    assert (got - exact).abs().max() <= exact.abs().max() * ROUNDING[torch.bfloat16] * 1.1


def test_columns_past_65535(isa: str) -> None:
    check(2, 3, 70016, 0.01, torch.bfloat16)


def test_opcheck(isa: str) -> None:
    nf4, _, _ = quantized(6, 64, nested=True)
    for csr in (None, delta(6, 64, 0.1)):
        args = (matrix(2, 64, torch.bfloat16), *nf4, *(csr or (None, None, None)), 6)
        torch.library.opcheck(torch.ops.qrosa.dequant_spmm.default, args)


def test_bad_inputs_are_refused(isa: str) -> None:
    nf4, _, _ = quantized(6, 64, nested=True)
    csr = delta(6, 64, 0.2)
    x = matrix(2, 64, torch.bfloat16)
    for args, message in (
        ((x[:, :63].contiguous(), nf4, None, 6), "codes"),
        ((x, nf4, None, 7), "codes"),
        ((x, nf4, csr._replace(col=torch.full_like(csr.col, 64)), 6), "outside the matrix"),
        ((x, nf4, csr._replace(row_ptr=csr.row_ptr + 1000), 6), "outside the matrix"),
        ((x[0], nf4, None, 6), "matrix"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.dequant_spmm(*args)
