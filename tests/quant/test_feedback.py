"""Error feedback against the textbook formula, and what it is for: a lower output error in the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qrosa.errors import InputError
from qrosa.quant.feedback import round_with_feedback
from qrosa.quant.grid import Grid
from qrosa.quant.hessian import Factor, InputMoments, factor
from qrosa.quant.maxima import search_maxima
from qrosa.quant.nf4 import NF4Weight

SHAPES = [(24, 192), (5, 70), (8, 64), (3, 130)]  # whole blocks a row; blocks over row ends; one; more than a chunk


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and the second moments [K, K] of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    inputs[:, ::17] *= 6
    return torch.randn(rows, columns, generator=generator) * 0.05, inputs.T @ inputs


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    return Grid().levels[codes.int()] * scales


def output_error(difference: Tensor, moments: Tensor) -> float:
    """tr(D H D^T)."""
    return float(((difference @ moments) * difference).sum())


def textbook(weight: Tensor, scales: Tensor, moments: Tensor, order: Tensor, damping: float) -> Tensor:
    """The greedy solver (OBQ in one order): after each column, invert what is left of H anew. fp64."""
    grid, work, codes = Grid(), weight.double().clone(), torch.zeros_like(weight, dtype=torch.uint8)
    hessian = moments.double() + damping * moments.double().diagonal().mean() * torch.eye(len(order))
    left = order.tolist()
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        j = left[0]
        codes[:, j] = grid.codes((work[:, j] / scales[:, j]).float())
        error = work[:, j] - grid.levels[codes[:, j].int()] * scales[:, j]
        work[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    return codes


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_codes_are_those_of_the_textbook(rows: int, columns: int) -> None:
    weight, moments = problem(rows, columns)
    scales = search_maxima(weight).expand()
    factored = factor(moments, 0.03)
    got = round_with_feedback(weight, scales, factored).codes
    expected = textbook(weight, scales, moments, factored.order, 0.03)
    # fp32 against fp64: a value that lies on a midpoint may fall to either side, and its row goes another way.
    assert float((got == expected).float().mean()) > 0.97


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_output_error_is_below_that_of_nearest(rows: int, columns: int) -> None:
    weight, moments = problem(rows, columns)
    nearest = NF4Weight.quantize(weight).dequantize(torch.float32)
    factored = factor(moments, 0.01)
    maxima = search_maxima(weight, factored.worth())
    weight_4_bit = maxima.with_codes(round_with_feedback(weight, maxima.expand(), factored).codes)
    fed_back = weight_4_bit.dequantize(torch.float32)
    assert output_error(weight - fed_back, moments) < 0.6 * output_error(weight - nearest, moments)


def test_uncorrelated_inputs_give_nearest_rounding() -> None:
    weight, _ = problem(6, 96)
    scales = search_maxima(weight).expand()
    codes = round_with_feedback(weight, scales, factor(torch.diag(torch.rand(96) + 0.5))).codes
    assert torch.equal(codes.int(), Grid().codes(weight / scales))


def test_sparse_positions_are_exact_and_pass_no_error_on() -> None:
    weight, moments = problem(16, 128)
    exact = torch.zeros(16, 128, dtype=torch.bool)
    exact.view(-1)[:: 1 + 128 // 3] = True
    factored = factor(moments)
    maxima = search_maxima(weight, factored.worth(), exact)
    rounded = round_with_feedback(weight, maxima.expand(), factored, exact)
    four_bit = decoded(rounded.codes, maxima.expand())
    with_sparse = torch.where(exact, rounded.wanted, four_bit)
    plain = search_maxima(weight, factored.worth())
    without = decoded(round_with_feedback(weight, plain.expand(), factored).codes, plain.expand())
    assert output_error(weight - with_sparse, moments) < output_error(weight - without, moments)
    first = factored.order[0]
    assert torch.equal(rounded.wanted[:, first], weight[:, first])  # nothing came before it


def test_everything_sparse_changes_nothing() -> None:
    weight, moments = problem(4, 64)
    exact = torch.ones(4, 64, dtype=torch.bool)
    rounded = round_with_feedback(weight, torch.ones(4, 64), factor(moments), exact)
    assert torch.equal(rounded.wanted, weight)


def test_stacked_matrices_round_as_they_do_alone() -> None:
    weight, moments = problem(12, 128)
    factored, scales = factor(moments), search_maxima(weight).expand()
    together = round_with_feedback(weight, scales, factored).codes
    apart = [round_with_feedback(weight[i : i + 4], scales[i : i + 4], factored).codes for i in (0, 4, 8)]
    assert float((together == torch.cat(apart)).float().mean()) > 0.97  # sums of another order, as above


def test_the_factor_is_that_of_the_inverse() -> None:
    _, moments = problem(1, 40)
    factored = factor(moments, 0.05)
    damped = moments.double() + 0.05 * moments.double().diagonal().mean() * torch.eye(40)
    inverse = torch.linalg.inv(damped[factored.order][:, factored.order])
    upper = factored.upper.double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-4, atol=1e-6 * float(inverse.abs().max()))
    assert bool((moments.diagonal()[factored.order].diff() <= 0).all())
    torch.testing.assert_close(factored.worth()[factored.order], upper.diagonal().float() ** -2)


def test_the_moments_stay_as_they_were_and_dead_channels_do_no_harm() -> None:
    weight, moments = problem(4, 64)
    moments[7], moments[:, 7] = 0, 0
    for hessian in (moments, moments.double()):
        before = hessian.clone()
        factored = factor(hessian)
        assert torch.equal(hessian, before)
        codes = round_with_feedback(weight, search_maxima(weight).expand(), factored).codes
        assert bool(factored.upper.isfinite().all()) and int(codes.max()) <= 15


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_unusable_moments_are_refused(fill: float) -> None:
    with pytest.raises(InputError, match="second moments"):
        factor(torch.full((8, 8), fill))


def test_moments_are_summed_over_passes_and_shared() -> None:
    layers = {name: torch.nn.Linear(6, 3) for name in ("q", "k", "o", "never")}
    first, second, other = torch.randn(2, 5, 6), torch.randn(1, 4, 6), torch.randn(2, 2, 6)
    moments = InputMoments(layers)
    with moments.watch():
        for x in (first, second):
            layers["q"](x)
            layers["k"](x)
            layers["o"](other + 0)
    layers["q"](first)  # outside: not counted
    rows = torch.cat((first.flatten(0, 1), second.flatten(0, 1)))
    assert moments.groups() == [["q", "k"], ["o"]]
    torch.testing.assert_close(moments.sums["q"], rows.T @ rows)
    torch.testing.assert_close(moments.sums["o"], 2 * other.flatten(0, 1).T @ other.flatten(0, 1))


def test_rounding_is_deterministic() -> None:
    weight, moments = problem(16, 192)
    results = []
    for _ in range(2):
        factored: Factor = factor(moments)
        maxima = search_maxima(weight, factored.worth())
        results.append((maxima.absmax, round_with_feedback(weight, maxima.expand(), factored).codes))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
