"""Which storages count as the card's, how many bytes they take, and what the driver would say of them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from tests.card.standin.timeline import HOST, Timeline, Use

GRANULE = 512  # bytes; torch's allocator for cards hands out multiples of this
CONTEXT = 700 << 20  # bytes that the stand-in's driver keeps for the process: unlike any constant of the planner


class Memory:
    """Storages by place. Every tensor's data lies in host memory; the record here says what it stands for.

    Args:
        timeline: Checks the order of use.
        total: Bytes of the card.
        others: Bytes of it that other programs use.

    Attributes:
        pinned: Bytes of pinned host memory alive, and ``pinned_limit`` the most that there may be.
        faults: Uses of freed memory that nothing orders, found where no exception can be raised.
    """

    def __init__(self, timeline: Timeline, total: int, others: int) -> None:
        self.timeline, self.total, self.others = timeline, total, others
        self.fraction = self.lowest_fraction = 1.0
        self.allocated = self.peak = self.allocations = 0
        self.pinned, self.pinned_limit = 0, 1 << 62
        self.fail_at: int | None = None
        self.faults: list[str] = []
        self._uses: dict[int, tuple[Any, Use, str, int]] = {}

    def place(self, tensor: Tensor) -> str:
        """``card``, ``pinned`` or ``host``."""
        found = self._uses.get(tensor.untyped_storage()._cdata)
        return found[2] if found is not None else "host"

    def use(self, tensor: Tensor) -> Use | None:
        """The record of a tensor's storage; None for plain host memory, which only the host uses."""
        found = self._uses.get(tensor.untyped_storage()._cdata)
        return found[1] if found is not None else None

    def settle(self, tensor: Tensor, place: str, *, written: bool) -> None:
        """Say where a new tensor lies.

        Raises:
            OutOfMemoryError: It is more than the process may have, or a failure was asked for.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // GRANULE) * GRANULE
        # The host also writes by ways that no operation shows; and nothing is missing from what has no bytes.
        written = written or place == "pinned" or not storage.nbytes()
        if key in self._uses:
            self._mark(self._uses[key][1], written=written)
            return
        if place == "card":
            self._take(size)
            owner = self.timeline.current
        else:
            if self.pinned + size > self.pinned_limit:
                raise RuntimeError("CUDA error: out of memory (cudaHostAlloc)")
            self.pinned += size
            owner = self.timeline.host
        use = Use(owner.number)
        self._mark(use, written=written)
        self._uses[key] = (weakref.ref(storage, lambda _: self._free(key)), use, place, size)

    def _mark(self, use: Use, *, written: bool) -> None:
        """Memory that was filled by whatever made it; no operation of its own has said so."""
        if written and use.written is None:
            owner = self.timeline.host if use.owner == HOST else self.timeline.streams[use.owner]
            use.written = (owner.number, owner.time)

    def _take(self, size: int) -> None:
        self.allocations += 1
        if self.allocations == self.fail_at or self.allocated + size > self.most:
            self.fail_at = None
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{self.total / 2**30:.2f} GiB"
            )
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def _free(self, key: int) -> None:
        _, use, place, size = self._uses.pop(key)
        if place == "pinned":
            self.pinned -= size
            return
        self.allocated -= size
        fault = self.timeline.freed(use) if use.owner != HOST else None
        if fault is not None:
            self.faults.append(fault)

    @property
    def most(self) -> int:
        """Bytes that the process's allocator may take."""
        return int(min(self.fraction * self.total, self.total - self.others - CONTEXT))

    @property
    def free(self) -> int:
        """What the driver calls free."""
        return self.total - self.others - CONTEXT - self.allocated
