"""Rounding to the 16 levels of NF4, and packing the codes two a byte.

A code is the index of a level in the rising table, so nearest-level rounding is a search among the 15 midpoints. Ties
and the last bit of a midpoint do not matter to whoever reads the codes: a decoder only looks levels up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrosa.ops.operands import NF4_TABLE


class Grid:
    """The levels and their midpoints on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.levels = torch.tensor(NF4_TABLE, dtype=torch.float32, device=device)
        self.midpoints = (self.levels[1:] + self.levels[:-1]) / 2

    def codes(self, scaled: Tensor) -> Tensor:
        """The nearest level's index for values in units of their block's maximum: int32, same shape."""
        return torch.bucketize(scaled, self.midpoints, out_int32=True)

    def nearest(self, scaled: Tensor) -> Tensor:
        """The nearest level itself, fp32, same shape."""
        return self.levels[self.codes(scaled)]


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [N, K] (0 to 15) -> uint8 [ceil(N * K / 2)], the earlier code in the high nibble."""
    flat = codes.flatten().to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    pairs = flat.view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]
