"""The best low-rank product against the closed form with a Cholesky factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qrosa.quant.low_rank import best_low_rank


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3 * columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def output_error(difference: Tensor, moments: Tensor) -> float:
    return float(((difference @ moments) * difference).sum())


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 60, 4), (60, 40, 1), (8, 50, 8), (300, 64, 6)])
def test_reaches_the_least_output_error(rows: int, columns: int, rank: int) -> None:
    error, moments = problem(rows, columns)
    lower = torch.linalg.cholesky(moments.double() + 1e-9 * torch.eye(columns))
    singular = torch.linalg.svdvals(error.double() @ lower)
    b, a = best_low_rank(error, moments, rank, seed=1)
    assert b.shape == (rows, rank) and a.shape == (rank, columns)
    least = float(singular[rank:].square().sum())
    whole = float(singular.square().sum())
    assert output_error(error - b @ a, moments) <= 1.001 * least + 1e-6 * whole


def test_factors_are_level_and_repeat() -> None:
    error, moments = problem(30, 50)
    b, a = best_low_rank(error, moments, 3, seed=7)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))
    again = best_low_rank(error, moments, 3, seed=7)
    assert torch.equal(again[0], b) and torch.equal(again[1], a)


def test_no_error_gives_no_product() -> None:
    b, a = best_low_rank(torch.zeros(6, 8), torch.eye(8), 2, seed=0)
    assert float((b @ a).abs().max()) == 0 and bool(a.isfinite().all())
