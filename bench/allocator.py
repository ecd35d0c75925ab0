"""A model of torch's caching allocator for cards: what it reserves to serve a series of requests.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp``, with its default settings. Requests are rounded up to 512
bytes; those of at most 1 MiB live in a pool of their own. A request takes the smallest free block that is large enough
and gives back what is left of it; blocks that are freed join their free neighbours. Where no block is large enough,
memory comes from the driver: in segments of fixed size, which nothing joins (``Segments``), or at the end of one range
a pool that grows by pages (``Expandable``, ``expandable_segments:True``).

Left out: streams, rounding options, and memory that the driver itself rounds.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

GRANULE, SMALL = 512, 1 << 20  # bytes; requests up to SMALL have their own pool
SMALL_SEGMENT, LARGE_SEGMENT, ROUND = 2 << 20, 20 << 20, 2 << 20
MIDDLE = 10 << 20  # requests from here on get a segment of their own size


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(eq=False)
class Block:
    """A stretch of reserved memory, in use or free, between its neighbours in the same segment."""

    size: int
    start: int
    small: bool
    free: bool = True
    before: Block | None = None
    after: Block | None = None


class Segments:
    """Segments of fixed size.

    Attributes:
        reserved: Bytes taken from the driver, ``peak`` the most so far.
        allocated: Bytes handed out.
    """

    def __init__(self) -> None:
        self.reserved = self.peak = self.allocated = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        self._end = 0

    def take(self, size: int) -> Block:
        """Memory for ``size`` bytes."""
        size = max(GRANULE, _round_up(size, GRANULE))
        small = size <= SMALL
        block = self._smallest(size, small) or self._more(size, small)
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        return block

    def give(self, block: Block) -> None:
        """Take a block back and join it with its free neighbours."""
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._forget(other)
                first, second = (other, block) if other is block.before else (block, other)
                block.start, block.size = first.start, first.size + second.size
                block.before, block.after = first.before, second.after
                self._joined(other, block)
        for neighbour, side in ((block.before, "after"), (block.after, "before")):
            if neighbour is not None:
                setattr(neighbour, side, block)
        self._keep(block)

    def empty_cache(self) -> None:
        """Give segments that are all free back to the driver."""
        for pool in self._free.values():
            for entry in [entry for entry in pool if entry[2].before is None and entry[2].after is None]:
                pool.remove(entry)
                self.reserved -= entry[0]

    def _more(self, size: int, small: bool) -> Block:
        segment = SMALL_SEGMENT if small else LARGE_SEGMENT if size < MIDDLE else _round_up(size, ROUND)
        self._reserve(segment)
        self._end += segment
        return Block(segment, self._end - segment, small)

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak = max(self.peak, self.reserved)

    def _smallest(self, size: int, small: bool) -> Block | None:
        pool = self._free[small]
        place = bisect.bisect_left(pool, size, key=lambda entry: entry[0])
        return pool.pop(place)[2] if place < len(pool) else None

    def _splits(self, block: Block, left: int) -> bool:
        return left >= GRANULE if block.small else left > SMALL

    def _split(self, block: Block, size: int) -> None:
        left = block.size - size
        if not self._splits(block, left):
            return
        rest = Block(left, block.start + size, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        self._joined(block, rest)
        self._keep(rest)

    def _keep(self, block: Block) -> None:
        bisect.insort(self._free[block.small], (block.size, block.start, block), key=lambda entry: entry[:2])

    def _forget(self, block: Block) -> None:
        pool = self._free[block.small]
        del pool[bisect.bisect_left(pool, (block.size, block.start), key=lambda entry: entry[:2])]

    def _joined(self, old: Block, new: Block) -> None:
        """``new`` ends where ``old`` did."""


class Expandable(Segments):
    """One range a pool, mapped page by page at its end; free pages at the end can be given back."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[bool, Block | None] = {True: None, False: None}

    def empty_cache(self) -> None:
        """Give back the whole pages at the ends that are free."""
        for small, last in self._last.items():
            if last is None or not last.free:
                continue
            self._forget(last)
            given = last.size // self._page(small) * self._page(small)
            last.size -= given
            self.reserved -= given
            if last.size:
                self._keep(last)
            else:
                self._last[small] = last.before
                if last.before is not None:
                    last.before.after = None

    def _more(self, size: int, small: bool) -> Block:
        last = self._last[small]
        have = last.size if last is not None and last.free else 0
        more = _round_up(size - have, self._page(small))
        self._reserve(more)
        if last is not None and have:
            self._forget(last)
            last.size += more
            return last
        start = last.start + last.size if last is not None else (0 if small else 1 << 50)
        block = Block(more, start, small, before=last)
        if last is not None:
            last.after = block
        self._last[small] = block
        return block

    @staticmethod
    def _page(small: bool) -> int:
        return SMALL_SEGMENT if small else LARGE_SEGMENT

    def _splits(self, block: Block, left: int) -> bool:
        return left >= GRANULE

    def _joined(self, old: Block, new: Block) -> None:
        if self._last[old.small] is old:
            self._last[old.small] = new
