"""Block maxima that are searched instead of taken.

Rounding to nearest divides a block by its largest magnitude, so that this one value is exact and all others pay for
it. A smaller maximum clips one value and makes the grid finer for 63. Which is better depends on what the values are
worth: the search takes, for each block, the share of the largest magnitude that minimises

    sum_j  worth_j (w_j - round(w_j))^2

over a few candidates. With ``worth`` = 1 / U_jj^2 (``hessian.Factor.worth``) this is the loss that error feedback
cannot push on to later columns, to first order. Positions of a sparse part are outside: they are exact whatever the
block's maximum is, so they neither count nor set it.

Maxima are stored in 8 bits (*nested*, bitsandbytes' double quantisation). The rounding of the maxima happens here,
before any code is chosen, so that codes are chosen against the maxima that will be read back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qrosa.ops.reference import block_absmax
from qrosa.quant.grid import Grid, pack_codes
from qrosa.quant.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Weight

SHARES = tuple(round(0.78 + 0.02 * step, 2) for step in range(14))  # 0.78 to 1.04 of the largest magnitude
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}  # values searched at once: on a CPU what its caches hold


@dataclass(frozen=True)
class BlockMaxima:
    """The maxima of one matrix as they are stored; ``NF4Weight`` says what each tensor is."""

    absmax: Tensor
    absmax_code: Tensor
    absmax_scale: Tensor
    absmax_offset: Tensor
    shape: tuple[int, int]

    def expand(self) -> Tensor:
        """The maximum of each value's block as it will be read back, fp32 [N, K]."""
        rows, columns = self.shape
        blocks = block_absmax(self._weight(self.absmax.new_empty(0)).operands())
        return blocks.repeat_interleave(BLOCK_SIZE)[: rows * columns].view(rows, columns)

    def with_codes(self, codes: Tensor, dtype: torch.dtype = torch.bfloat16) -> NF4Weight:
        """The packed weight that holds ``codes`` [N, K] (0 to 15) under these maxima."""
        return self._weight(pack_codes(codes), dtype)

    def _weight(self, packed: Tensor, dtype: torch.dtype = torch.bfloat16) -> NF4Weight:
        return NF4Weight(
            packed, self.absmax, self.absmax_code, self.absmax_scale, self.absmax_offset, self.shape, dtype
        )


def search_maxima(weight: Tensor, worth: Tensor | None = None, exact: Tensor | None = None) -> BlockMaxima:
    """Choose and store the block maxima of a dense weight.

    Args:
        weight: fp32 [N, K].
        worth: fp32 [K], what a squared error in a column costs; None takes the plain maxima, unsearched.
        exact: bool [N, K], positions that a sparse part holds; None for none.
    """
    blocks = _blocks(weight if exact is None else weight.masked_fill(exact, 0))
    largest = blocks.abs().amax(1)
    if worth is not None:
        costs = worth.expand_as(weight)
        largest = _search(blocks, largest, _blocks(costs if exact is None else costs.masked_fill(exact, 0)))
    return nest(largest, (weight.shape[0], weight.shape[1]))


def nest(maxima: Tensor, shape: tuple[int, int]) -> BlockMaxima:
    """Quantise maxima fp32 [blocks] to 8 bits, as bitsandbytes does."""
    from bitsandbytes import functional

    offset = maxima.mean()
    absmax, state = functional.quantize_blockwise(maxima - offset, blocksize=NESTED_BLOCK_SIZE)
    return BlockMaxima(absmax, state.code.float(), state.absmax.float(), offset.float(), shape)


def _blocks(values: Tensor) -> Tensor:
    """[N, K] -> [blocks, 64] in flat order, the last block filled up with zeros."""
    flat = values.flatten()
    missing = math.ceil(flat.numel() / BLOCK_SIZE) * BLOCK_SIZE - flat.numel()
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK_SIZE)


def _search(blocks: Tensor, largest: Tensor, worth: Tensor) -> Tensor:
    """The candidate of least cost for each block, fp32 [blocks]; a block of zeros keeps its zero."""
    grid = Grid(blocks.device)
    chosen = largest.clone()
    step = _CHUNK[blocks.device.type] // BLOCK_SIZE
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        best = torch.full_like(largest[part], math.inf)
        for share in SHARES:
            maxima = (largest[part] * share).clamp_min(torch.finfo(torch.float32).tiny)
            error = grid.nearest(blocks[part] / maxima[:, None]).mul_(maxima[:, None]).sub_(blocks[part])
            cost = error.square_().mul_(worth[part]).sum(1)
            better = cost < best
            best = torch.where(better, cost, best)
            chosen[part] = torch.where(better & (largest[part] > 0), largest[part] * share, chosen[part])
    return chosen
