"""How much memory a process takes, now and at its highest, phase by phase.

On a card the allocator keeps the count. On the CPU the kernel does: ``VmHWM`` of ``/proc/self/status`` is the
highest resident size since it was last reset, and writing ``5`` to ``/proc/self/clear_refs`` resets it, so a phase's
peak is exact, not sampled. glibc keeps freed memory resident for later, which would count one phase's memory towards
the next: where one phase follows another it is asked to give it back first, and within a phase when the plan is near
(``qrosa.heap``). Where the file cannot be written the peak since the process started stands in; elsewhere than on Linux
the current size does, which is a lower bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from qrosa import heap
from qrosa.planner.plan import Plan


class MemoryMeter:
    """Peak bytes of each phase of a run on one device.

    Args:
        device: Whose memory is meant.
        peaks: Peaks of an earlier part of the run.
        plan: What the phases are to stay within on the CPU; None for no bound.

    Attributes:
        peaks: Phase -> highest bytes: allocated by torch on a card, resident in the process on the CPU.
        reserved: Phase -> highest bytes that torch's allocator took from a card; empty on the CPU.
    """

    def __init__(self, device: torch.device, peaks: dict[str, int] | None = None, plan: Plan | None = None) -> None:
        self.device = device
        self.plan = plan
        self.peaks: dict[str, int] = dict(peaks or {})
        self.reserved: dict[str, int] = {}
        self._last = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block towards ``name``; phases may come back, and do not nest."""
        self._reset(give_back=name != self._last)
        self._last = name
        try:
            with self._bound(name):
                yield
        finally:
            self.peaks[name] = max(self.peaks.get(name, 0), self.peak())
            if self.device.type == "cuda":
                reserved = torch.cuda.max_memory_reserved(self.device)
                self.reserved[name] = max(self.reserved.get(name, 0), reserved)

    def peak(self) -> int:
        """Highest bytes since the phase began."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return heap.resident("VmHWM")

    def now(self) -> int:
        """Bytes taken at this moment."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return heap.resident("VmRSS")

    def _bound(self, name: str) -> AbstractContextManager[None]:
        """On the CPU the heap is held to the plan."""
        memory = self.plan.phases.get(name) if self.plan is not None and self.device.type == "cpu" else None
        if memory is None or self.plan is None:
            return nullcontext()
        return heap.within(self.plan.bytes_of(memory), memory.coming, memory.host["kept_heap"])

    def _reset(self, *, give_back: bool) -> None:
        if self.device.type == "cuda":
            if give_back:  # what one phase cut up would stand in the next one's way
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        if give_back:
            heap.give_back()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            return  # not permitted, or not Linux: the peak then covers earlier phases too
