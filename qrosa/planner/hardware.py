"""What is here, asked without torch: the driver for a card, the kernel and its limits for the host, the launcher for
the processes of a run.

All of it is read once, at the edge (the command line, ``prepare``), into one record. A plan is a pure function of that
record, of the model's shape and of what was asked for."""

from __future__ import annotations

import ctypes
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from qrosa.processor import widens_products

MIB = 2**20
HOST_SHARE = 0.9  # of the host's free memory: the rest is for what other programs do meanwhile
_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the name since 2.0, and the one from 2.9 on
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Overhead:
    """What a process takes of a card beside its tensors.

    Attributes:
        context: Bytes of the driver's context and loaded kernels.
        workspace: Bytes of cuBLAS's workspaces, for the forward thread and for autograd's.
    """

    context: int
    workspace: int


# Until a card is there to be asked. Context: 350 to 600 MiB have been seen for bare contexts; the most that anybody has
# published for driver and runtime together is 1.4 GiB (Unsloth Studio's memory estimate, on an RTX 5070 Ti), which
# these two add up to. Workspace: what strict determinism has cuBLAS take, eight pieces of 4 MiB a thread.
UNMEASURED = Overhead(context=1370 * MIB, workspace=2 * 32 * MIB)


@dataclass(frozen=True)
class Here:
    """What this machine has for a run.

    Attributes:
        card: Bytes of the first card's memory, None where there is no card.
        host: Bytes of host memory that may be taken.
        processes: Processes of the run, on all machines.
        sharing: Those of them on this machine, which share its memory.
        card_free: Bytes of the card that no program uses, None where the driver does not say.
        pinned: Bytes of host memory that a card may be given direct access to, None for no limit of its own.
        overhead: What this process takes of the card beside tensors.
        widens: The processor multiplies 16-bit floats faster in fp32.
    """

    card: int | None
    host: int
    processes: int = 1
    sharing: int = 1
    card_free: int | None = None
    pinned: int | None = None
    overhead: Overhead = UNMEASURED
    widens: bool = False

    @property
    def card_room(self) -> int | None:
        """Bytes of the card that a run can have: those that are free, else all."""
        return self.card_free if self.card_free is not None else self.card


def read_here() -> Here:
    """Ask driver, kernel and launcher."""
    card = _first_card()
    total = card[1] if card is not None else None
    free = _free_bytes(card[0]) if card is not None else None
    sharing = processes_on_this_host()
    return Here(total, host_memory(), processes_here(), sharing, free, pinned_limit(), widens=widens_products())


def ask_for_expandable_segments() -> None:
    """Have torch's allocator grow its blocks in place, unless the user has settled it otherwise; before the first use.

    Blocks of fixed size leave holes that rows of many lengths never fill.
    """
    if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def card_memory() -> int | None:
    """Bytes of the first CUDA card's memory (``CUDA_VISIBLE_DEVICES`` is honoured); None where there is no card."""
    card = _first_card()
    return card[1] if card is not None else None


def _first_card() -> tuple[str, int] | None:
    """Name for the driver's management library, and bytes, of the first card that CUDA shows this process."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device):
        return None
    raw = (ctypes.c_ubyte * 16)()
    driver.cuDeviceGetUuid(raw, device)
    return f"GPU-{uuid.UUID(bytes=bytes(raw))}", size.value


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def _free_bytes(name: str) -> int | None:
    """Bytes of a card that no program uses: asked of the management library, which makes no context on the card."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    card, memory = ctypes.c_void_p(), _Memory()
    if library.nvmlInit_v2():
        return None
    try:
        if library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(card)):
            return None
        return None if library.nvmlDeviceGetMemoryInfo(card, ctypes.byref(memory)) else int(memory.free)
    finally:
        library.nvmlShutdown()


def pinned_limit() -> int | None:
    """Bytes of host memory that may be pinned: half of it under WSL, whose driver keeps to that; else no limit."""
    import psutil

    try:
        kernel = Path("/proc/version").read_text(encoding="utf-8", errors="replace").lower()
    except OSError:
        return None
    return int(psutil.virtual_memory().total) // 2 if "microsoft" in kernel else None


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


def machine_here() -> int:
    """Index of this machine among those of the run, whose processes launchers number machine by machine."""
    rank = os.environ.get("RANK", "0")
    return int(rank) // processes_on_this_host() if rank.isdigit() else 0


def _count(name: str) -> int:
    text = os.environ.get(name, "1")
    return int(text) if text.isdigit() and int(text) > 0 else 1
