"""The gate of a feed-forward block: kernels against the reference in fp64, gradients, views, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import FLOATS, ROUNDING, matrix, seeds

from qrosa.ops import reference
from qrosa.ops.gate import gate
from qrosa.ops.library import _COMPOSITIONS

CANCELLED = 2.0**-19
"""Where the slope crosses zero, its terms cancel; with dy and up they are of size 16 at most."""
WIDTHS = (1, 3, 15, 16, 17, 63, 65, 200, 1039)


def _within(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, roundings: int) -> None:
    """So many roundings, and some units in fp32's last place of s, which is at most 2^7, in the sigmoid's exponent."""
    bound = roundings * ROUNDING[dtype] * exact.abs() * 1.02 + 2.0**-18 * exact.abs().clamp(max=16.0) + CANCELLED
    excess = ((got.double() - exact).abs() - bound).max().item() if exact.numel() else 0.0
    assert excess <= 0, f"off by {excess:.3g} more than the bound"


def _check(rows: int, width: int, dtype: torch.dtype, gelu: bool, seed: int = 0, scale: float = 2.0) -> None:
    g, up, dy = (matrix(rows, width, dtype, seed + i) * (scale if i == 0 else 1.0) for i in range(3))
    _within(torch.ops.qrosa.gate(g, up, gelu), reference.gate(g.double(), up.double(), gelu), dtype, 2)
    exact = reference.gate_backward(dy.double(), g.double(), up.double(), gelu)
    for got, want in zip(torch.ops.qrosa.gate_backward(dy, g, up, gelu), exact, strict=True):
        _within(got, want, dtype, 1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gelu", [False, True])
def test_kernel_against_fp64(isa: str, dtype: torch.dtype, gelu: bool) -> None:
    for width in WIDTHS:
        _check(5, width, dtype, gelu, seed=width)
    _check(3, 1000, dtype, gelu, scale=40.0)
    _check(0, 16, dtype, gelu)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(0, 9), width=st.integers(1, 300), dtype=st.sampled_from(FLOATS), gelu=st.booleans(), seed=seeds)
def test_any_shape(rows: int, width: int, dtype: torch.dtype, gelu: bool, seed: int) -> None:
    _check(rows, width, dtype, gelu, seed)


def test_ends_of_the_scale(isa: str) -> None:
    """Far out the activation is 0 or the gate itself; what is no number stays none."""
    ends = torch.tensor([[-1e30, -300.0, -88.5, -0.0, 0.0, 88.5, 300.0, 1e30, float("nan")]])
    for gelu in (False, True):
        y = torch.ops.qrosa.gate(ends, torch.ones_like(ends), gelu)
        torch.testing.assert_close(y[:, 1:8], reference.gate(ends, torch.ones_like(ends), gelu)[:, 1:8])
        assert y[0, 8].isnan() and y[0, 0].abs() < 1e-6
        slopes = torch.ops.qrosa.gate_backward(torch.ones_like(ends), ends, torch.ones_like(ends), gelu)[0]
        assert slopes[0, 1].abs() < 1e-6 and slopes[0, 6] == 1.0 and slopes[0, 8].isnan()


def test_the_composition_gives_the_same(isa: str) -> None:
    g, up, dy = (matrix(64, 200, torch.bfloat16, i) for i in range(3))
    for gelu in (False, True):
        assert (torch.ops.qrosa.gate(g, up, gelu) != _COMPOSITIONS["gate"](g, up, gelu)).float().mean() < 0.002
        kernel, plain = torch.ops.qrosa.gate_backward(dy, g, up, gelu), _COMPOSITIONS["gate_backward"](dy, g, up, gelu)
        assert all((one != other).float().mean() < 0.002 for one, other in zip(kernel, plain, strict=True))


@pytest.mark.parametrize("gelu", [False, True])
def test_gradient_of_the_reference(gelu: bool) -> None:
    g, up, dy = (matrix(3, 7, torch.float64, i) for i in range(3))
    leaves = g.requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: gate(a, b, gelu), leaves)
    expected = torch.autograd.grad(reference.gate(*leaves, gelu), leaves, dy)
    torch.testing.assert_close(reference.gate_backward(dy, g.detach(), up.detach(), gelu), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_parts_of_wider_rows(isa: str, dtype: torch.dtype) -> None:
    """Gate and up as the halves of one projection's output: read where they lie, and nothing else is saved."""
    joined = matrix(6, 34, dtype).view(2, 3, 34).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = gate(*joined.chunk(2, -1), False)
    assert len(saved) == 2 and {t.untyped_storage().data_ptr() for t in saved} == {joined.data_ptr()}
    apart = [half.contiguous() for half in joined.chunk(2, -1)]
    expected = gate(*apart, False)
    assert torch.equal(y, expected) and y.is_contiguous()
    dy = matrix(6, 17, dtype, 1).view(2, 3, 17)
    assert torch.equal(torch.autograd.grad(y, joined, dy)[0], torch.autograd.grad(expected, joined, dy)[0])


def test_opcheck(isa: str) -> None:
    g, up = (matrix(6, 9, torch.bfloat16, i).requires_grad_() for i in range(2))
    torch.library.opcheck(torch.ops.qrosa.gate.default, (g, up, True))
    plain = g.detach(), up.detach()
    torch.library.opcheck(torch.ops.qrosa.gate_backward.default, (plain[0], *plain, False))


def test_refused() -> None:
    g = matrix(4, 8, torch.bfloat16)
    for other in (g[:2], g[:, :4], g.float()):
        with pytest.raises(RuntimeError):
            torch.ops.qrosa.gate(g, other, False)
    with pytest.raises(RuntimeError, match="dense"):
        torch.ops.qrosa.gate(g[:, ::2], g[:, ::2], False)
    with pytest.raises(RuntimeError, match="dy must hold"):
        torch.ops.qrosa.gate_backward(g[:2], g, g, False)
