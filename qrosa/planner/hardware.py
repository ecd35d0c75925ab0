"""What is here, asked without torch: the driver for a card, the kernel and its limits for the host, the launcher for
the processes of a run.

All of it is read once, at the edge (the command line, ``prepare``), into one record. A plan is a pure function of that
record, of the model's shape and of what was asked for."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

HOST_SHARE = 0.9  # of the host's free memory: the rest is for what other programs do meanwhile
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Here:
    """What this machine has for a run.

    Attributes:
        card: Bytes of the first card's memory, None where there is no card.
        host: Bytes of host memory that may be taken.
        processes: Processes of the run, on all machines.
        sharing: Those of them on this machine, which share its memory.
    """

    card: int | None
    host: int
    processes: int = 1
    sharing: int = 1


def read_here() -> Here:
    """Ask driver, kernel and launcher."""
    return Here(card_memory(), host_memory(), processes_here(), processes_on_this_host())


def card_memory() -> int | None:
    """Bytes of the first CUDA card's memory (``CUDA_VISIBLE_DEVICES`` is honoured); None where there is no card."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device):
        return None
    return size.value


def host_memory() -> int:
    """Bytes of host memory that a run may take: free memory, within the container's limit, less a reserve."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return int(free * HOST_SHARE)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None


def processes_here() -> int:
    """Processes that this run is started in, as its launcher says."""
    return _count("WORLD_SIZE")


def processes_on_this_host() -> int:
    """Those of them on this machine, which share its memory; torchrun and accelerate name them so, or deepspeed."""
    return _count("LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE")


def _count(name: str) -> int:
    text = os.environ.get(name, "1")
    return int(text) if text.isdigit() and int(text) > 0 else 1
