"""A layer for few rows as one op: base, delta, low-rank part and bias, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_inputs import FEW_ROWS, FLOATS, ROUNDING, close, delta, densities, matrix, quantized, seeds, sizes

from qrosa import ops
from qrosa.ops import decode, reference

isa_is_fixed = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALE = 0.5


def arguments(
    rows: int, n: int, k: int, rank: int, density: float | None, dtype: torch.dtype, nested: bool = True, seed: int = 0
) -> dict[str, Any]:
    low_rank = None if rank == 0 else torch.bfloat16 if seed % 2 == 0 else torch.float32
    return {
        "x": matrix(rows, k, dtype, seed + 1),
        "nf4": quantized(n, k, nested, seed)[0],
        "csr": None if density is None else delta(n, k, density, seed),
        "a": None if low_rank is None else (matrix(rank, k, torch.float32, seed + 2) * k**-0.5).to(low_rank),
        "b": None if low_rank is None else matrix(n, rank, low_rank, seed + 3),
        "bias": matrix(1, n, dtype, seed + 4)[0].clone(),
    }


def flat(given: dict[str, Any], n: int) -> tuple[Any, ...]:
    csr = given["csr"] or (None, None, None)
    return (given["x"], *given["nf4"], n, given["bias"], *csr, given["a"], given["b"], SCALE)


def check(n: int, k: int, rank: int, given: dict[str, Any]) -> None:
    got = torch.ops.qrosa.decode_linear(*flat(given, n))
    x, bias = given["x"], given["bias"]
    exact = reference.linear(x.double(), given["nf4"], n, bias.double(), given["csr"], given["a"], given["b"], SCALE)
    assert got.dtype == x.dtype and got.shape == exact.shape
    # k products of the base, rank products of numbers of size 1, and the sums of x A^T, of k products each.
    close(got, exact, x.dtype, k + 2 * rank + 1, size=2.0 + rank)


@isa_is_fixed
@given(
    rows=st.sampled_from((0, 1, 2, 3, 4, 5, 7, 9)),
    n=sizes,
    k=sizes,
    rank=st.sampled_from((0, 1, 7, 16, 40)),
    density=densities,
    dtype=st.sampled_from(FLOATS),
    nested=st.booleans(),
    seed=seeds,
)
def test_equals_the_fp64_reference(
    isa: str, rows: int, n: int, k: int, rank: int, density: float, dtype: torch.dtype, nested: bool, seed: int
) -> None:
    check(n, k, rank, arguments(rows, n, k, rank, density, dtype, nested, seed))


@pytest.mark.parametrize("shape", FEW_ROWS)
def test_real_widths(isa: str, shape: tuple[int, int, int]) -> None:
    rows, n, k = shape
    for dtype in FLOATS:
        check(n, k, 16, arguments(rows, n, k, 16, 0.02, dtype))


def test_leading_dimensions_stay(isa: str) -> None:
    given = arguments(6, 20, 64, 4, 0.1, torch.bfloat16)
    flat_rows = torch.ops.qrosa.decode_linear(*flat(given, 20))
    nested = torch.ops.qrosa.decode_linear(*flat({**given, "x": given["x"].view(2, 3, 64)}, 20))
    assert torch.equal(nested, flat_rows.view(2, 3, 20))


def test_threads_do_not_change_the_bits(isa: str) -> None:
    given = arguments(3, 1030, 576, 16, 0.02, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.qrosa.decode_linear(*flat(given, 1030)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_an_infinite_input_reaches_only_what_reads_it(isa: str) -> None:
    """Padding and shared vectors must not turn a neighbour's zero into a NaN."""
    given = arguments(2, 7, 192, 0, None, torch.float32)
    clean = torch.ops.qrosa.decode_linear(*flat(given, 7))
    given["x"][1, 150] = torch.inf
    got = torch.ops.qrosa.decode_linear(*flat(given, 7))
    exact = reference.linear(given["x"].double(), given["nf4"], 7, given["bias"].double(), None, None, None, SCALE)
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[1].isnan(), exact[1].isnan()) and torch.equal(got[1].sign(), exact[1].sign().float())


def test_small_updates_are_not_lost(isa: str) -> None:
    """An adapter too small for bf16 beside the base still moves the sum before its one rounding."""
    given = arguments(1, 512, 576, 16, None, torch.bfloat16)
    given["b"] = given["b"] * 2.0**-9
    wide = {name: value.double() if name in ("x", "bias") else value for name, value in given.items()}
    exact = reference.linear(wide["x"], given["nf4"], 512, wide["bias"], None, given["a"], given["b"], SCALE)
    fused = torch.ops.qrosa.decode_linear(*flat(given, 512)).double()
    parts = decode.decode_linear(
        given["x"], given["nf4"], 512, given["bias"], None, given["a"], given["b"], SCALE
    ).double()
    assert (fused - exact).abs().mean() < (parts - exact).abs().mean()


def test_the_layer_takes_it_for_few_rows_without_gradients(isa: str) -> None:
    given = arguments(2, 40, 128, 8, 0.05, torch.bfloat16)
    whole = (given["x"], given["nf4"], 40, given["bias"], given["csr"], given["a"], given["b"], SCALE)
    with torch.no_grad():
        few = ops.linear(*whole)
        many = ops.linear(given["x"].repeat(20, 1), *whole[1:])[:2]
    assert torch.equal(few, torch.ops.qrosa.decode_linear(*flat(given, 40)))
    # Many rows go by a weight rounded to bf16, or add rounded parts: some roundings of sums of 128 terms more.
    assert (many.float() - few.float()).abs().max() <= 4 * ROUNDING[torch.bfloat16] * few.float().abs().max()
    given["a"].requires_grad_()
    assert ops.linear(*whole).requires_grad


def test_the_composition_says_the_same() -> None:
    given = arguments(3, 24, 128, 8, 0.1, torch.float32)
    x, nf4, csr, a, b, bias = (given[name] for name in ("x", "nf4", "csr", "a", "b", "bias"))
    composed = decode.decode_linear(x, nf4, 24, bias, csr, a, b, SCALE)
    torch.testing.assert_close(composed, torch.ops.qrosa.decode_linear(*flat(given, 24)), rtol=1e-5, atol=1e-4)


def test_opcheck(isa: str) -> None:
    for rank, density in ((0, None), (4, 0.1)):
        torch.library.opcheck(
            torch.ops.qrosa.decode_linear.default, flat(arguments(2, 6, 64, rank, density, torch.bfloat16), 6)
        )


def test_bad_inputs_are_refused(isa: str) -> None:
    good = arguments(2, 6, 64, 4, 0.2, torch.bfloat16)
    csr = good["csr"]
    for change, message in (
        ({"x": good["x"][:, :63].contiguous()}, "codes"),
        ({"x": good["x"].t()}, "contiguous"),
        ({"a": good["a"][:, :63].contiguous()}, "a must be"),
        ({"b": good["b"][:5]}, "b must be"),
        ({"b": good["b"].float()}, "dtype"),
        ({"b": None}, "both a and b"),
        ({"bias": good["bias"][:5]}, "bias"),
        ({"bias": good["bias"].float()}, "bias"),
        ({"csr": csr._replace(col=torch.full_like(csr.col, 64))}, "outside the matrix"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.qrosa.decode_linear(*flat({**good, **change}, 6))


def test_a_plan_is_the_layer(isa: str) -> None:
    for rank, density in ((0, None), (16, 0.05)):
        given = arguments(3, 70, 192, rank, density, torch.bfloat16)
        plan = ops.plan_decode(given["nf4"], (70, 192), given["bias"], given["csr"], given["a"], given["b"], SCALE)
        assert plan is not None
        x = given["x"].view(1, 3, 192)
        expected = torch.ops.qrosa.decode_linear(*flat(given, 70))
        assert torch.equal(ops.decode_planned(x, plan.packed), expected.view(1, 3, 70))
        for bad, message in ((x[..., :64].contiguous(), "columns"), (x.float(), "dtype"), (x.mT, "contiguous")):
            with pytest.raises(RuntimeError, match=message):
                ops.decode_planned(bad, plan.packed)
        with pytest.raises(RuntimeError, match="not a plan"):
            ops.decode_planned(x, torch.zeros_like(plan.packed))


def test_a_plan_is_checked_like_the_layer(isa: str) -> None:
    given = arguments(1, 6, 64, 4, 0.2, torch.bfloat16)
    nf4, csr, a, b = (given[name] for name in ("nf4", "csr", "a", "b"))
    for args, message in (
        ((nf4, (7, 64), None, csr, a, b, SCALE), "codes"),
        ((nf4, (6, 64), given["bias"][:5], csr, a, b, SCALE), "bias"),
        ((nf4, (6, 64), None, csr, a[:, :63].contiguous(), b, SCALE), "a must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.plan_decode(*args)
