"""Rounding to the 16 levels of NF4, and packing the codes two a byte.

A code is the index of a level in the rising table, so nearest-level rounding is a search among the 15 midpoints. Ties
and the last bit of a midpoint do not matter to whoever reads the codes: a decoder only looks levels up.

The search is a look-up: -1 to 1 is cut into bins that hold one midpoint at most, so a bin's first code is right or one
too low, and one comparison tells. (``torch.bucketize`` takes four times as long on a CPU.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrosa.ops.operands import NF4_TABLE

_BINS = 1024  # 0.002 wide; midpoints are 0.08 apart and more


class Grid:
    """The levels and their midpoints on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.levels = torch.tensor(NF4_TABLE, dtype=torch.float32, device=device)
        self.midpoints = (self.levels[1:] + self.levels[:-1]) / 2
        starts = torch.linspace(-1, 1, _BINS + 1, device=device)[:-1] - 1e-6  # a value may land in the next bin
        self._first = torch.bucketize(starts, self.midpoints, out_int32=True)
        self._above = torch.cat((self.midpoints, self.midpoints.new_full((1,), torch.inf)))

    def codes(self, scaled: Tensor) -> Tensor:
        """The nearest level's index for values in units of their block's maximum: int32, same shape."""
        flat = scaled.flatten()
        places = (flat + 1).mul_(_BINS / 2).clamp_(0, _BINS - 1).to(torch.int32)
        codes = self._first.index_select(0, places)
        codes += flat > self._above.index_select(0, codes)
        return codes.view_as(scaled)

    def nearest(self, scaled: Tensor) -> Tensor:
        """The nearest level itself, fp32, same shape."""
        return self.levels.index_select(0, self.codes(scaled).flatten()).view_as(scaled)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [N, K] (0 to 15) -> uint8 [ceil(N * K / 2)], the earlier code in the high nibble."""
    flat = codes.flatten().to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    pairs = flat.view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]
