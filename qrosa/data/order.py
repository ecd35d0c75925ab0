"""Which rows a step takes, and how they are cut into micro-batches, by their lengths alone.

The order of rows is a **pure function of seed and step**: epochs are seeded permutations laid end to end, a step
takes the next ``batch_size`` places. There is no sampler to save: a resumed run computes where it was.

A step's rows are sorted by length and cut into micro-batches bounded in rows and in padded tokens, so little is
padding, and memory is bounded by the longest micro-batch, which comes **first**: what does not fit fails at once,
not at the worst step. Packed, they have no padding, and as many go together as fit end to end.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def step_rows(n_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row numbers of one optimizer step; every row comes once before any comes again.

    Args:
        n_rows: Rows of the data set, above 0.
        batch_size: Rows a step.
        step: Counted from 0.
        seed: Of the order.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_epoch_order(n_rows, place // n_rows, seed)[place % n_rows]) for place in places]


@lru_cache(maxsize=4)
def _epoch_order(n_rows: int, epoch: int, seed: int) -> np.ndarray:
    import numpy as np  # only where rows are known: a plan without them answers quicker than it is imported

    # RandomState, not default_rng: NumPy promises that its streams never change, so old runs resume under a new NumPy.
    return np.random.RandomState([seed, epoch]).permutation(n_rows)


def longest_of_any_step(lengths: Sequence[int], batch_size: int) -> list[int]:
    """The most tokens that the rows of a step can have, longest first, whatever the order of rows.

    A step that spans the end of an epoch may take a row of both, and more often where a step takes more than all rows.
    """
    times = 1 + -(-(batch_size - 1) // len(lengths))
    longest = heapq.nlargest(batch_size, lengths)
    return [length for length in longest for _ in range(times)][:batch_size]


def cut(lengths: Sequence[int], *, max_rows: int, max_tokens: int, packed: bool = False) -> Iterator[list[int]]:
    """Cut rows into micro-batches, longest first.

    Args:
        lengths: Tokens of each row.
        max_rows: Most rows a micro-batch, at least 1.
        max_tokens: Most tokens a micro-batch, padding included. A row that is longer by itself stands alone.
        packed: Rows lie end to end, so that nothing is padded.

    Yields:
        Places in ``lengths``; each comes once.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while order:
        count = _fitting(lengths, order, max_tokens) if packed else max_tokens // max(1, lengths[order[0]])
        count = max(1, min(max_rows, count))
        yield order[:count]
        order = order[count:]


def _fitting(lengths: Sequence[int], order: Sequence[int], max_tokens: int) -> int:
    """How many of the first rows of ``order`` fit end to end."""
    for count, place in enumerate(order):
        max_tokens -= lengths[place]
        if max_tokens < 0:
            return count
    return len(order)


def padded_share(steps: Iterable[Sequence[int]], *, max_rows: int, max_tokens: int) -> float:
    """The share of padding in all tokens of some steps' micro-batches, were they not packed.

    Args:
        steps: Tokens of each row, step by step.
        max_rows: Most rows a micro-batch.
        max_tokens: Most tokens a micro-batch, padding included.
    """
    own = laid_out = 0
    for lengths in steps:
        own += sum(lengths)
        for places in cut(lengths, max_rows=max_rows, max_tokens=max_tokens):
            laid_out += len(places) * lengths[places[0]]
    return 1 - own / laid_out if laid_out else 0.0
