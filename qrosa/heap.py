"""The C library's heap of a run on the CPU, held to what the plan leaves it; without torch.

glibc keeps most of what tensors free, and what it keeps depends on the order of their sizes: after some steps a third
of the process may be memory that nobody uses. Mapping every tensor by itself would end that, at the price of fresh
pages for each (a third of a step, measured). So the heap is left to grow as far as the plan goes, and is asked to give
back what is free (``malloc_trim``) before something comes that would take the process over it.

It is looked at where much comes: before each quantised layer, forward, in recomputation, and when the gradient of its
input is there; before each chunk of logits; for each tensor that is loaded. A look reads ``/proc/self/statm``, some
microseconds. There is one heap a process, so this is the one place of the package with state of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_AGAIN = 0.125  # of what may be kept: growth since memory was last given back that makes it worth asking again


@dataclass
class _Bound:
    planned: int
    coming: int
    step: int
    left: int = 0  # resident when memory was last given back


_bounds: list[_Bound] = []


@contextmanager
def within(planned: int | None, coming: int = 0, kept: int = 0) -> Iterator[None]:
    """Keep the process within a bound while the block runs.

    Args:
        planned: Bytes that the process may have in memory; None for no bound.
        coming: Bytes that may come between two looks that do not say how much.
        kept: Bytes of ``planned`` that free memory may take.
    """
    if planned is None:
        yield
        return
    _bounds.append(_Bound(planned, coming, round(_AGAIN * kept)))
    try:
        look()
        yield
    finally:
        _bounds.pop()


def bounded() -> bool:
    """Whether a bound is in force."""
    return bool(_bounds)


def look(coming: int | None = None) -> None:
    """Have free memory given back if ``coming`` bytes, or what a layer takes, would go over the bound.

    Or near it: between two times that memory is given back it may grow by the bound's step, which must have room too.
    """
    if not _bounds:
        return
    bound = _bounds[-1]
    now = resident_now()
    if now + (bound.coming if coming is None else coming) <= bound.planned - bound.step:
        bound.left = 0
    elif now > bound.left + bound.step:
        give_back()
        bound.left = resident_now()


def look_at_each(progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """``progress`` with a look before it."""

    def told(done: int, of: int) -> None:
        look()
        progress(done, of)

    return told


def resident_now() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(64).split()[1]) * _PAGE
    except OSError:
        return 0


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


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


def give_back() -> None:
    """Ask glibc to return freed heap memory to the system; does nothing under another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
