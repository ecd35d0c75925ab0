"""Searched block maxima, and that plain ones are bitsandbytes' own bytes."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional

from qrosa.quant.grid import Grid, pack_codes
from qrosa.quant.maxima import SHARES, search_maxima
from qrosa.quant.nf4 import NF4Weight


@pytest.mark.parametrize("shape", [(8, 128), (5, 70), (1, 3), (300, 64)])
def test_plain_maxima_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = NF4Weight.quantize(weight)
    maxima = search_maxima(weight)
    got = maxima.with_codes(Grid().codes(weight))  # any codes do
    for name in ("absmax", "absmax_code", "absmax_scale", "absmax_offset"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("shape", [(8, 128), (5, 70), (1, 3)])
def test_bitsandbytes_reads_the_same_values(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    maxima = search_maxima(weight, torch.rand(shape[1]) + 0.1)
    codes = Grid().codes(weight / maxima.expand())
    packed = maxima.with_codes(codes, torch.float32)
    values = Grid().levels[codes] * maxima.expand()
    assert torch.equal(packed.dequantize(torch.float32), values)
    assert torch.equal(functional.dequantize_4bit(*packed.to_bnb()), values)


def test_searched_maxima_lower_the_weighted_error() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    worth = torch.rand(128) ** 4 + 0.01

    def cost(maxima: torch.Tensor) -> float:
        return float((worth * (Grid().nearest(weight / maxima) * maxima - weight).square()).sum())

    assert cost(search_maxima(weight, worth).expand()) < 0.95 * cost(search_maxima(weight).expand())


def test_sparse_positions_do_not_set_the_maximum() -> None:
    weight = torch.full((1, 64), 0.5)
    weight[0, 9] = 40.0
    exact = weight > 1
    largest = float(search_maxima(weight, torch.ones(64), exact).expand().max())
    assert min(SHARES) * 0.5 <= largest <= max(SHARES) * 0.5


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = torch.linspace(-1, 1, 64)
    maxima = search_maxima(weight, torch.ones(64))
    assert bool(maxima.expand().isfinite().all())
    assert torch.equal(maxima.with_codes(Grid().codes(weight)).dequantize(torch.float32)[0], weight[0])


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_codes_are_packed_earlier_one_high(count: int) -> None:
    codes = torch.randint(0, 16, (1, count), generator=torch.Generator().manual_seed(count))
    packed = pack_codes(codes)
    unpacked = torch.stack((packed >> 4, packed & 15), 1).flatten()[:count]
    assert packed.numel() == (count + 1) // 2 and torch.equal(unpacked.long(), codes[0])
