"""The random control: positions drawn uniformly without replacement, the exact count, in memory of that count.

Positions are drawn with replacement from a seeded generator and the first k distinct ones are kept, which is what
drawing without replacement means; a permutation of [N, K] would take eight bytes a weight. Above half of a matrix the
complement is drawn. The generator runs on the CPU and is seeded by path, so that a matrix's mask depends on nothing
but the seed, its path and its size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def random_positions(sizes: Mapping[str, int], counts: Mapping[str, int], scope: str, seed: int) -> dict[str, Tensor]:
    """Random masks.

    Args:
        sizes: Path -> N * K, in model order.
        counts: Path -> positions to draw; with scope ``global`` their sum is drawn from the whole model.
        scope: ``matrix`` or ``global``.
        seed: Any integer.

    Returns:
        Path -> flat positions, int64, rising.
    """
    if scope == "matrix":
        return {path: draw_distinct(size, counts[path], _generator(seed, path)) for path, size in sizes.items()}
    total = draw_distinct(sum(sizes.values()), sum(counts.values()), _generator(seed, ""))
    found, start = {}, 0
    for path, size in sizes.items():
        low, high = torch.searchsorted(total, torch.tensor([start, start + size])).tolist()
        found[path] = total[low:high] - start
        start += size
    return found


def draw_distinct(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` distinct integers below ``size``, uniform, int64, rising."""
    if count > size // 2:
        keep = torch.ones(size, dtype=torch.bool)
        keep[draw_distinct(size, size - count, generator)] = False
        return keep.nonzero().flatten()
    draws = torch.empty(0, dtype=torch.int64)
    while True:
        more = count - draws.numel()
        if more <= 0:
            return draws.sort().values
        # At most half of the values are taken, so twice the missing number nearly always suffices at once.
        fresh = torch.randint(size, (2 * more + 16,), generator=generator)
        draws = _distinct_in_order(torch.cat([draws, fresh]))[:count]


def _distinct_in_order(values: Tensor) -> Tensor:
    """The values without repeats, in the order in which they first appear."""
    ordered, index = values.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return values[index[first].sort().values]


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
