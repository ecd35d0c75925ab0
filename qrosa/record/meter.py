"""How much memory a process takes, now and at its highest, phase by phase.

On a card the allocator keeps the count. On the CPU the kernel does: ``VmHWM`` of ``/proc/self/status`` is the
highest resident size since it was last reset, and writing ``5`` to ``/proc/self/clear_refs`` resets it, so a phase's
peak is exact, not sampled. glibc keeps freed memory resident for later, which would count one phase's memory towards
the next: where one phase follows another it is asked to give it back first. Steps on rows of many lengths cut the heap
up, and it grows: when a step begins near its planned bytes, the same is asked. (At every step it would cost some 5%.)
Where the file cannot be written the peak since the process started stands in; elsewhere than on Linux the current size
does, which is a lower bound.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

NEAR = 0.9  # of the planned bytes, at the start of a step: some of what comes next is not in the heap yet


class MemoryMeter:
    """Peak bytes of each phase of a run on one device.

    Args:
        device: Whose memory is meant.
        peaks: Peaks of an earlier part of the run.
        planned: Phase -> bytes that the phase is to stay within on the CPU.

    Attributes:
        peaks: Phase -> highest bytes: allocated by torch on a card, resident in the process on the CPU.
        reserved: Phase -> highest bytes that torch's allocator took from a card; empty on the CPU.
    """

    def __init__(
        self, device: torch.device, peaks: dict[str, int] | None = None, planned: Mapping[str, int] | None = None
    ) -> None:
        self.device = device
        self.planned: Mapping[str, int] = planned or {}
        self.peaks: dict[str, int] = dict(peaks or {})
        self.reserved: dict[str, int] = {}
        self._last = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block towards ``name``; phases may come back, and do not nest."""
        self._reset(give_back=name != self._last or self._near_plan(name))
        self._last = name
        try:
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
        return resident("VmHWM")

    def now(self) -> int:
        """Bytes taken at this moment."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return resident("VmRSS")

    def _near_plan(self, name: str) -> bool:
        planned = self.planned.get(name)
        return planned is not None and self.device.type == "cpu" and self.now() > NEAR * planned

    def _reset(self, *, give_back: bool) -> None:
        if self.device.type == "cuda":
            if give_back:  # what one phase cut up would stand in the next one's way
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        if give_back:
            give_back_free_memory()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            return  # not permitted, or not Linux: the peak then covers earlier phases too


def resident(field: str) -> int:
    """``VmHWM`` (peak) or ``VmRSS`` (now) of this process in bytes."""
    try:
        with open("/proc/self/status") as file:
            found = re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)


def give_back_free_memory() -> None:
    """Ask glibc to return freed heap memory to the system; does nothing under another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
