"""dY^T X at the stored positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_inputs import FLOATS, close, delta, densities, matrix, seeds, sizes, tokens

from qrosa import ops
from qrosa.ops import reference

isa_is_fixed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(rows: int, n: int, k: int, density: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    csr = delta(n, k, density, seed)
    dy, x = matrix(rows, n, dtype, seed), matrix(rows, k, dtype, seed + 1)
    got = ops.sddmm(dy, x, csr.row_ptr, csr.col)
    exact = reference.sddmm(dy.double(), x.double(), csr.row_ptr, csr.col)
    assert got.dtype == torch.float32
    close(got, exact, torch.float32, rows)
    return got


@isa_is_fixed
@given(rows=tokens, n=sizes, k=sizes, density=densities, dtype=st.sampled_from(FLOATS), seed=seeds)
def test_equals_the_fp64_reference(
    isa: str, rows: int, n: int, k: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    check(rows, n, k, density, dtype, seed)


@pytest.mark.parametrize("dtype", FLOATS)
def test_more_rows_than_a_chunk(isa: str, dtype: torch.dtype) -> None:
    check(1030, 40, 64, 0.1, dtype)


def test_columns_past_32767_and_past_65535(isa: str) -> None:
    check(3, 4, 40000, 0.01, torch.bfloat16)
    check(3, 4, 70000, 0.01, torch.bfloat16)


def test_bits_do_not_depend_on_threads(isa: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):  # few threads pack X each for itself, more share one copy
            torch.set_num_threads(threads)
            results.append(check(600, 100, 300, 0.05, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_no_rows_give_zeros(isa: str) -> None:
    assert torch.equal(check(0, 5, 7, 1.0, torch.bfloat16), torch.zeros(35))


def test_opcheck(isa: str) -> None:
    csr = delta(9, 40, 0.2)
    args = (matrix(7, 9, torch.bfloat16), matrix(7, 40, torch.bfloat16), csr.row_ptr, csr.col)
    torch.library.opcheck(torch.ops.qrosa.sddmm.default, args)


def test_bad_inputs_are_refused(isa: str) -> None:
    csr = delta(9, 40, 0.2)
    dy, x = matrix(7, 9, torch.bfloat16), matrix(7, 40, torch.bfloat16)
    for args, message in (
        ((dy[:6], x, csr.row_ptr, csr.col), "rows"),
        ((dy.float(), x, csr.row_ptr, csr.col), "dtype"),
        ((dy, x, csr.row_ptr[1:], csr.col), "row_ptr"),
        ((dy, x, csr.row_ptr, csr.col.to(torch.int32)), "col"),
        ((dy, x, csr.row_ptr, torch.full_like(csr.col, 40)), "outside the matrix"),
        ((dy, x, csr.row_ptr + 1, csr.col), "row_ptr"),
        ((dy, x.t().contiguous().t(), csr.row_ptr, csr.col), "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.sddmm(*args)
