"""Tiles of dY^T X into the mask statistic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_inputs import FLOATS, SUM_ERROR, matrix, seeds, sizes, tokens

from qrosa import ops

isa_is_fixed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(rows: int, n: int, k: int, dtype: torch.dtype, square: bool, seed: int = 0) -> torch.Tensor:
    dy, x = matrix(rows, n, dtype, seed), matrix(rows, k, dtype, seed + 1)
    stat = matrix(n, k, torch.float32, seed + 2)
    exact = dy.double().t() @ x.double()
    expected = stat.double() + (exact * exact if square else exact)
    # The product is off by d, so its square by 2 |product| d; the statistic itself is rounded once.
    off = SUM_ERROR * max(rows, 1)
    bound = (2 * exact.abs() * off + off * off if square else off) + expected.abs() * 2.0**-23 + 2.0**-23
    ops.score_accumulate(dy, x, stat, square)
    assert torch.all((stat.double() - expected).abs() <= bound)
    return stat


@isa_is_fixed
@given(rows=tokens, n=sizes, k=sizes, dtype=st.sampled_from(FLOATS), square=st.booleans(), seed=seeds)
def test_equals_the_fp64_reference(
    isa: str, rows: int, n: int, k: int, dtype: torch.dtype, square: bool, seed: int
) -> None:
    check(rows, n, k, dtype, square, seed)


@pytest.mark.parametrize("dtype", FLOATS)
def test_more_than_one_tile_in_each_direction(isa: str, dtype: torch.dtype) -> None:
    check(300, 300, 600, dtype, square=True)


def test_bits_do_not_depend_on_threads(isa: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(check(100, 300, 600, torch.bfloat16, square=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_opcheck(isa: str) -> None:
    args = (matrix(7, 9, torch.bfloat16), matrix(7, 40, torch.bfloat16), torch.zeros(9, 40), True)
    torch.library.opcheck(torch.ops.qrosa.score_accumulate.default, args)


def test_bad_inputs_are_refused(isa: str) -> None:
    dy, x = matrix(7, 9, torch.bfloat16), matrix(7, 40, torch.bfloat16)
    for args, message in (
        ((dy, x, torch.zeros(40, 9), True), "stat"),
        ((dy, x, torch.zeros(9, 40, dtype=torch.bfloat16), True), "stat"),
        ((dy[:3], x, torch.zeros(9, 40), True), "rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.score_accumulate(*args)
