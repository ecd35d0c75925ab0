"""The whole layer as one op: against autograd through the reference, and under PyTorch's machinery."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_inputs import ROUNDING, delta, matrix, quantized, seeds, sizes
from torch.utils.checkpoint import checkpoint

from qrosa import ops
from qrosa.ops import CsrOperands, reference
from qrosa.ops.dropout import dropout

isa_is_fixed = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Tensors = dict[str, torch.Tensor]


def inputs(rows: int, n: int, k: int, rank: int, density: float, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    low_rank = wide if dtype == torch.float64 else torch.bfloat16
    csr = delta(n, k, density, seed)
    return {
        "nf4": quantized(n, k, True, seed)[0],
        "positions": (csr.row_ptr, csr.col),
        "x": matrix(rows, k, dtype, seed + 1).requires_grad_(),
        "values": csr.values.to(wide).requires_grad_(),
        "a": (matrix(rank, k, low_rank, seed + 2) * k**-0.5).requires_grad_(),
        "b": matrix(n, rank, low_rank, seed + 3).requires_grad_(),
        "bias": matrix(1, n, dtype, seed + 4)[0].clone().requires_grad_(),
        "dy": matrix(rows, n, dtype, seed + 5),
    }


NAMES = ("x", "values", "a", "b", "bias")


def fused(given: dict[str, Any], scale: float, p: float) -> torch.Tensor:
    csr = CsrOperands(*given["positions"], given["values"])
    n = given["dy"].shape[-1]
    return ops.linear(given["x"], given["nf4"], n, given["bias"], csr, given["a"], given["b"], scale, p, 11)


def exact(given: dict[str, Any], scale: float, p: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients by PyTorch's own autograd through the reference, in fp64."""
    wide = {name: given[name].detach().double().requires_grad_() for name in NAMES}
    csr = CsrOperands(*given["positions"], wide["values"])
    dropped = dropout(given["x"].detach().double(), p, 11) if p else None
    if dropped is not None:  # the mask as a factor, so that the gradient passes
        dropped = wide["x"] * dropout(torch.ones_like(dropped), p, 11)
    n = given["dy"].shape[-1]
    y = reference.linear(wide["x"], given["nf4"], n, wide["bias"], csr, wide["a"], wide["b"], scale, dropped)
    gradients = torch.autograd.grad(y, list(wide.values()), given["dy"].double(), materialize_grads=True)
    return y, list(gradients)


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, name: str, term: float = 1.0) -> None:
    """Within a few roundings of operands (weight, projected and dropped input) to ``dtype``, a sum, and a last one.

    All relative to the largest result, or to the terms (of size ``term``) where a sum of few terms cancels. The sums
    have some 600 terms at most, each good for 2^-24 of the result's size or less.
    """
    if want.numel():
        bound = (5 * ROUNDING[dtype] + 600 * 2.0**-24) * max(want.abs().max().item(), term)
        assert (got.double() - want).abs().max().item() <= bound, name
    assert got.shape == want.shape, name


@pytest.mark.parametrize("shape", [(33, 40, 64), (70, 130, 576), (5, 7, 33), (40, 192, 256), (600, 96, 320)])
def test_output_and_gradients_equal_autograd_through_the_reference(isa: str, shape: tuple[int, int, int]) -> None:
    for dtype, p in itertools.product((torch.bfloat16, torch.float32), (0.0, 0.2)):
        given = inputs(*shape, 3, 0.05, dtype)
        y = fused(given, 0.5, p)
        gradients = torch.autograd.grad(y, [given[name] for name in NAMES], given["dy"])
        want_y, want = exact(given, 0.5, p)
        assert y.dtype == dtype
        assert_near(y, want_y, dtype, f"y, {p}")
        for name, gradient, expected in zip(NAMES, gradients, want, strict=True):
            assert gradient.dtype == given[name].dtype, name
            assert_near(gradient, expected, torch.bfloat16 if name in "ab" else dtype, f"{name}, {p}")


@isa_is_fixed
@given(rows=st.sampled_from((1, 2, 17, 65)), n=sizes, k=sizes, rank=st.sampled_from((1, 5, 33)), seed=seeds)
def test_odd_shapes(isa: str, rows: int, n: int, k: int, rank: int, seed: int) -> None:
    given = inputs(rows, n, k, rank, 0.1, torch.bfloat16, seed)
    y = fused(given, 1.5, 0.1)
    gradients = torch.autograd.grad(y, [given[name] for name in NAMES], given["dy"])
    want_y, want = exact(given, 1.5, 0.1)
    # Sums over the rank and over N come before others, so what cancels can be as large as this.
    term = 6 * max(n, rank) ** 0.5
    assert_near(y, want_y, torch.bfloat16, "y", term)
    for name, gradient, expected in zip(NAMES, gradients, want, strict=True):
        assert_near(gradient, expected, torch.bfloat16, name, term)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_in_fp64(p: float) -> None:
    given = inputs(4, 6, 10, 2, 0.3, torch.float64)

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return fused({**given, **dict(zip(NAMES, tensors, strict=True))}, 0.7, p)

    assert torch.autograd.gradcheck(layer, tuple(given[name] for name in NAMES))


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_small_low_rank_parts_are_not_lost_in_rounding(isa: str, p: float) -> None:
    """A part far below half a unit in the last place of y, or of dX, still moves it as often as it should."""
    given = inputs(512, 64, 128, 4, 0.05, torch.bfloat16)
    given["b"] = (given["b"].detach() * 2.0**-7).requires_grad_()
    given["bias"] = torch.zeros_like(given["bias"]).requires_grad_()
    y = fused(given, 0.5, p)
    (dx,) = torch.autograd.grad(y, given["x"], given["dy"])
    want_y, want = exact(given, 0.5, p)
    csr = CsrOperands(*given["positions"], given["values"].detach())
    base = reference.effective_weight(given["nf4"], csr, (64, 128), torch.bfloat16).double()
    for got, full, alone in ((y, want_y, given["x"].double() @ base.t()), (dx, want[0], given["dy"].double() @ base)):
        bare = reference.effective_weight(given["nf4"], csr, (64, 128), torch.float64)
        part = full - (given["x"].double() @ bare.t() if got is y else given["dy"].double() @ bare)
        found = ((got.double() - alone) * part).sum() / part.square().sum()
        assert 0.85 < found < 1.15


def test_only_the_gradients_asked_for() -> None:
    full = inputs(9, 24, 64, 3, 0.1, torch.bfloat16)
    fused(full, 0.5, 0.1).backward(full["dy"])
    for needed in list(itertools.product((False, True), repeat=5))[1:]:
        given = inputs(9, 24, 64, 3, 0.1, torch.bfloat16)
        for name, need in zip(NAMES, needed, strict=True):
            given[name] = given[name].detach().requires_grad_(need)
        fused(given, 0.5, 0.1).backward(given["dy"])
        for name, need in zip(NAMES, needed, strict=True):
            assert (given[name].grad is not None) == need, (name, needed)
            if need:
                assert torch.equal(given[name].grad, full[name].grad), (name, needed)


@pytest.mark.parametrize("parts", ["base", "low-rank", "sparse"])
def test_parts_may_be_missing(isa: str, parts: str) -> None:
    given = inputs(40, 24, 64, 3, 0.1, torch.bfloat16)
    csr = CsrOperands(*given["positions"], given["values"]) if parts == "sparse" else None
    a, b = (given["a"], given["b"]) if parts == "low-rank" else (None, None)
    y = ops.linear(given["x"], given["nf4"], 24, None, csr, a, b, 0.5)
    y.backward(given["dy"])
    wide = given["x"].detach().double().requires_grad_()
    want = reference.linear(wide, given["nf4"], 24, None, csr, a, b, 0.5)
    want.backward(given["dy"].double())
    assert_near(y, want, torch.bfloat16, "y")
    assert_near(given["x"].grad, wide.grad, torch.bfloat16, "dx")


def test_leading_dimensions_strided_inputs_and_an_empty_batch() -> None:
    given = inputs(24, 16, 64, 2, 0.1, torch.bfloat16)
    flat = fused(given, 1.0, 0.0)
    folded = {**given, "x": given["x"].view(2, 3, 4, 64), "dy": given["dy"].view(2, 3, 4, 16)}
    assert torch.equal(fused(folded, 1.0, 0.0), flat.view(2, 3, 4, 16))
    strided = {**given, "x": given["x"].t().contiguous().t()}
    assert torch.equal(fused(strided, 1.0, 0.0), flat)
    (gradient,) = torch.autograd.grad(flat, given["x"], given["dy"].t().contiguous().t())
    (expected,) = torch.autograd.grad(fused(given, 1.0, 0.0), given["x"], given["dy"])
    assert torch.equal(gradient, expected)
    empty = {**given, "x": given["x"][:0].detach().requires_grad_(), "dy": given["dy"][:0]}
    fused(empty, 1.0, 0.0).sum().backward()
    assert torch.count_nonzero(given["values"].grad) == 0


def test_saves_x_once_and_no_weight_or_mask() -> None:
    given = inputs(32, 96, 128, 2, 0.1, torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(given, 1.0, 0.1)
    sizes = [t.numel() for t in saved if t.is_floating_point() and t.data_ptr() != given["values"].data_ptr()]
    assert sum(size == 32 * 128 for size in sizes) == 1
    assert max(sizes) == 32 * 128


def test_under_non_reentrant_checkpointing() -> None:
    given = inputs(32, 96, 128, 2, 0.1, torch.bfloat16)
    plain = torch.autograd.grad(fused(given, 1.0, 0.1), [given[name] for name in NAMES], given["dy"])
    y = checkpoint(lambda x: fused({**given, "x": x}, 1.0, 0.1), given["x"], use_reentrant=False)
    again = torch.autograd.grad(y, [given[name] for name in NAMES], given["dy"])
    assert all(torch.equal(p, q) for p, q in zip(plain, again, strict=True))


def test_few_rows_without_gradient_give_the_same_layer(isa: str) -> None:
    given = inputs(3, 96, 128, 2, 0.1, torch.bfloat16)
    with torch.no_grad():
        decoded = fused(given, 0.5, 0.0)
    want, _ = exact(given, 0.5, 0.0)
    assert_near(decoded, want.detach(), torch.bfloat16, "y")


def test_scratch_born_in_inference_mode_serves_training() -> None:
    """PyTorch itself is the judge: it raises where a tensor born in inference mode is written outside of it."""
    ops.release_workspace()
    given = inputs(32, 96, 128, 2, 0.1, torch.float32)
    with torch.inference_mode():
        fused(given, 1.0, 0.0)
    fused(given, 1.0, 0.0).sum().backward()


def test_fake_tensors_and_compile() -> None:
    given = inputs(32, 96, 128, 2, 0.1, torch.bfloat16)
    eager = torch.autograd.grad(fused(given, 1.0, 0.1), [given[name] for name in NAMES], given["dy"])
    compiled = torch.compile(lambda x: fused({**given, "x": x}, 1.0, 0.1), backend="aot_eager", fullgraph=True)
    traced = torch.autograd.grad(compiled(given["x"]), [given[name] for name in NAMES], given["dy"])
    assert all(torch.equal(p, q) for p, q in zip(eager, traced, strict=True))


def test_opcheck(isa: str) -> None:
    given = inputs(5, 12, 64, 2, 0.2, torch.bfloat16)
    csr = (*given["positions"], given["values"])
    args = (given["x"], *given["nf4"], 12, given["bias"], *csr, given["a"], given["b"], 0.5, 0.1, 3)
    torch.library.opcheck(torch.ops.qrosa.linear.default, args)
    bare = (given["x"], *given["nf4"], 12, None, None, None, None, None, None, 0.5, 0.0, 3)
    torch.library.opcheck(torch.ops.qrosa.linear.default, bare)


def test_bad_inputs_are_refused() -> None:
    given = inputs(5, 12, 64, 2, 0.2, torch.bfloat16)
    for change, message in (
        ({"a": given["a"][:, :63]}, "a must be"),
        ({"b": given["b"][:11]}, "b "),
        ({"bias": given["bias"][:11]}, "bias"),
        ({"x": given["x"][:, :63]}, "a must be"),
        ({"x": given["x"][:, :63], "a": None, "b": None}, "codes"),
        ({"values": given["values"][:-1]}, "values"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fused({**given, **change}, 1.0, 0.0)
