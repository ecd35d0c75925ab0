"""The look-up of codes against a search among the midpoints."""

from __future__ import annotations

import torch

from qrosa.quant.grid import Grid


def test_codes_are_those_of_a_search() -> None:
    grid = Grid()
    values = torch.cat(
        (
            torch.randn(100_000, generator=torch.Generator().manual_seed(0)) / 2,
            torch.linspace(-1.2, 1.2, 50_001),
            grid.midpoints,
            grid.midpoints.nextafter(torch.tensor(2.0)),
            grid.midpoints.nextafter(torch.tensor(-2.0)),
            grid.levels,
            torch.tensor([-1e30, 1e30, -torch.inf, torch.inf, -0.0, 0.0]),
        )
    )
    expected = torch.bucketize(values, grid.midpoints, out_int32=True)
    assert torch.equal(grid.codes(values), expected)
    assert torch.equal(grid.nearest(values), grid.levels[expected])
    square = values[:90_000].view(300, 300)
    assert torch.equal(grid.codes(square.mT), expected[:90_000].view(300, 300).mT)
