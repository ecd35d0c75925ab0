"""RMSNorm: kernels against the reference in fp64, gradients, layouts, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import FLOATS, ROUNDING, matrix, seeds

from qrosa.ops import force_cpu_isa, reference
from qrosa.ops.library import _COMPOSITIONS
from qrosa.ops.rms_norm import rms_norm

EPS = 1e-5
WIDTHS = (1, 3, 15, 16, 17, 63, 64, 65, 127, 576, 1000, 1039)
KINDS = ((0.0, True), (0.0, False), (1.0, False))  # Llama, OLMo, Gemma


def _within(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, roundings: int, size: float) -> None:
    """So many roundings of the result, and fp32 sums of terms whose root mean square is ``size``."""
    bound = roundings * ROUNDING[dtype] * exact.abs() * 1.02 + 2.0**-19 * size + ROUNDING[dtype] * 2.0**-14
    excess = ((got.double() - exact).abs() - bound).max().item() if exact.numel() else 0.0
    assert excess <= 0, f"off by {excess:.3g} more than the bound"


def _check(rows: int, width: int, dtype: torch.dtype, offset: float, rounds: bool, seed: int = 0) -> None:
    x, dy, weight = matrix(rows, width, dtype, seed), matrix(rows, width, dtype, seed + 1), matrix(1, width, dtype)[0]
    y, rstd = torch.ops.qrosa.rms_norm(x, weight, EPS, offset, rounds)
    exact, exact_rstd = reference.rms_norm(x.double(), weight.double(), EPS, offset, False)
    assert rstd.dtype == torch.float32
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2.0**-20, atol=0.0)
    _within(y, exact, dtype, 2 if rounds else 1, 1.0)
    dx = torch.ops.qrosa.rms_norm_backward(dy, x, weight, rstd, offset)
    gradient = reference.rms_norm_backward(dy.double(), x.double(), weight.double(), exact_rstd, offset)
    size = float(exact_rstd.max()) * 8.0 * (offset + 4.0) if rows else 1.0
    _within(dx, gradient, dtype, 1, size)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("offset", "rounds"), KINDS)
def test_kernel_against_fp64(isa: str, dtype: torch.dtype, offset: float, rounds: bool) -> None:
    for width in WIDTHS:
        _check(5, width, dtype, offset, rounds, seed=width)
    _check(0, 16, dtype, offset, rounds)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(0, 9), width=st.integers(1, 300), dtype=st.sampled_from(FLOATS), seed=seeds)
def test_any_shape(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    _check(rows, width, dtype, 0.0, True, seed)


def test_the_composition_gives_the_same(isa: str) -> None:
    """The same roundings in the same places: only the order of the sum differs."""
    x, dy, weight = (
        matrix(64, 200, torch.bfloat16, 1),
        matrix(64, 200, torch.bfloat16, 2),
        matrix(1, 200, torch.bfloat16),
    )
    for offset, rounds in KINDS:
        y, rstd = torch.ops.qrosa.rms_norm(x, weight[0], EPS, offset, rounds)
        expected, scale = _COMPOSITIONS["rms_norm"](x, weight[0], EPS, offset, rounds)
        assert (y != expected).float().mean() < 0.002
        torch.testing.assert_close(rstd, scale)
        dx = torch.ops.qrosa.rms_norm_backward(dy, x, weight[0], rstd, offset)
        assert (dx != _COMPOSITIONS["rms_norm_backward"](dy, x, weight[0], rstd, offset)).float().mean() < 0.02


def test_gradient_of_the_reference() -> None:
    x = matrix(3, 7, torch.float64).requires_grad_()
    weight, dy = matrix(1, 7, torch.float64, 1)[0], matrix(3, 7, torch.float64, 2)
    for offset in (0.0, 1.0):
        assert torch.autograd.gradcheck(lambda t, o=offset: rms_norm(t, weight, EPS, o), (x,))
        y, rstd = reference.rms_norm(x, weight, EPS, offset, True)
        (expected,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(reference.rms_norm_backward(dy, x.detach(), weight, rstd.detach(), offset), expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 2, 0)])
def test_rows_are_taken_as_they_lie(order: tuple[int, ...]) -> None:
    """Transposed heads are normed without a copy, and the result lies as they do; gradients go the same way."""
    whole = matrix(2 * 3 * 5, 16, torch.float32).view(2, 3, 5, 16).requires_grad_()
    x = whole.permute(order)
    weight = matrix(1, x.shape[-1], torch.float32, 1)[0]
    y = rms_norm(x, weight, EPS)
    expected = reference.rms_norm(x, weight, EPS, 0.0, True)[0]
    torch.testing.assert_close(y, expected)
    assert order[-1] != 3 or y.stride() == x.stride()
    dy = matrix(y.numel(), 1, torch.float32, 3).view(y.shape)
    torch.testing.assert_close(
        *(torch.autograd.grad(result, whole, dy, retain_graph=True)[0] for result in (y, expected))
    )


def test_what_is_saved() -> None:
    saved: list[torch.Tensor] = []
    x, weight = matrix(4, 8, torch.bfloat16).requires_grad_(), matrix(1, 8, torch.bfloat16)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        rms_norm(x, weight, EPS)
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in saved] == [
        (torch.bfloat16, (4, 8)), (torch.bfloat16, (8,)), (torch.float32, (4,))
    ]  # fmt: skip
    assert saved[0].data_ptr() == x.data_ptr() and saved[1].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    force_cpu_isa("amx")
    x, weight, threads = matrix(300, 600, dtype), matrix(1, 600, dtype)[0], torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(torch.ops.qrosa.rms_norm(x, weight, EPS, 0.0, True))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_opcheck(isa: str) -> None:
    x, weight = matrix(6, 9, torch.bfloat16).requires_grad_(), matrix(1, 9, torch.bfloat16)[0]
    torch.library.opcheck(torch.ops.qrosa.rms_norm.default, (x, weight, EPS, 1.0, False))
    with torch.no_grad():
        y, rstd = torch.ops.qrosa.rms_norm(x, weight, EPS, 1.0, False)
        torch.library.opcheck(torch.ops.qrosa.rms_norm_backward.default, (y, x.detach(), weight, rstd, 1.0))


def test_refused() -> None:
    x, weight = matrix(4, 8, torch.bfloat16), matrix(1, 8, torch.bfloat16)[0]
    with pytest.raises(RuntimeError, match="frozen"):
        rms_norm(x, weight.clone().requires_grad_(), EPS)
    for other in (weight[:4], weight.float()):
        with pytest.raises(RuntimeError, match="weight"):
            rms_norm(x, other, EPS)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.qrosa.rms_norm(x[:, ::2], weight[:4], EPS, 0.0, True)
    with pytest.raises(RuntimeError, match="dy must hold"):
        torch.ops.qrosa.rms_norm_backward(x[:2], x, weight, torch.ones(4), 0.0)
    with pytest.raises(RuntimeError, match="rstd must hold"):
        torch.ops.qrosa.rms_norm_backward(x, x, weight, torch.ones(3), 0.0)
