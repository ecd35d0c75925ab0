"""The dropout hash: kernel against composition, and its statistics."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_inputs import FLOATS, matrix

from qrosa.ops.dropout import dropout, keep_mask


def test_kernel_and_composition_agree_to_the_bit(isa: str) -> None:
    for dtype, p in itertools.product(FLOATS, (0.0, 0.05, 0.5, 0.99)):
        x = matrix(37, 53, dtype)
        assert torch.equal(torch.ops.qrosa.dropout(x, p, 123), dropout(x, p, 123)), (dtype, p)


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_share_independence_and_mean(p: float) -> None:
    count = 200_000
    device = torch.device("cpu")
    first, second = (~keep_mask(count, p, seed, device) for seed in (7, 8))
    sigma = (p * (1 - p) / count) ** 0.5
    assert abs(first.double().mean().item() - p) < 5 * sigma
    both = (first & second).double().mean().item()
    assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / count) ** 0.5
    neighbours = (first[1:] & first[:-1]).double().mean().item()
    assert abs(neighbours - p * p) < 6 * (p * p / count) ** 0.5
    assert abs(dropout(torch.ones(count), p, 7).mean().item() - 1.0) < 5 * sigma / (1 - p)


def test_opcheck(isa: str) -> None:
    torch.library.opcheck(torch.ops.qrosa.dropout.default, (matrix(7, 9, torch.bfloat16), 0.1, 3))


def test_a_share_outside_zero_to_one_is_refused(isa: str) -> None:
    for p in (-0.1, 1.0):
        with pytest.raises(RuntimeError, match="dropout"):
            torch.ops.qrosa.dropout(torch.ones(4), p, 0)
