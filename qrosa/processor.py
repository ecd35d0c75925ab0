"""How this machine's processor multiplies 16-bit floats, read without torch: a plan depends on it as a run does.

PyTorch hands such products to oneDNN. With matrix tiles (AMX) they are the fastest there are. Without AVX-512's bf16
instructions oneDNN or PyTorch's own loops emulate them: 4 to 50 times slower than fp32. With those instructions it
depends on who made the processor: Intel's do bf16 at two thirds of fp32's speed (a Xeon with its tiles switched off:
103 against 160 billion operations a second on one core), AMD's are built for twice the speed and are left alone; on
those nothing was measured.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

HEAD_BLOCK = 2**20
"""Weights of the output head that are widened at a time: 4 MiB in fp32, about a second-level cache."""
_CPUINFO = Path("/proc/cpuinfo")
_KERNELS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
"""What ``QROSA_CPU_ISA`` may hold the kernels to; products are held to it, too."""


def widens_products() -> bool:
    """Whether products of 16-bit floats are quicker in fp32 on this processor."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        text = _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return slow_in_16_bits(text, os.environ.get("QROSA_CPU_ISA", ""))


def slow_in_16_bits(cpuinfo: str, held_to: str = "") -> bool:
    """The same for the text of /proc/cpuinfo.

    Args:
        cpuinfo: As Linux shows it, of an x86-64 processor.
        held_to: The best instructions that may be used, by the name of the kernels; empty for all.
    """
    facts = {key.strip(): value.split() for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())}
    flags, vendor = set(facts.get("flags", ())), facts.get("vendor_id", [""])
    allowed = _KERNELS.index(held_to) if held_to in _KERNELS else len(_KERNELS)
    if {"amx_bf16", "amx_tile"} <= flags and allowed >= _KERNELS.index("amx"):
        return False
    return "avx512_bf16" not in flags or allowed < _KERNELS.index("avx512bf16") or vendor == ["GenuineIntel"]
