"""Which processors multiply 16-bit floats in fp32, by what Linux says of them."""

from __future__ import annotations

import pytest

from qrosa.ops.devices import is_served
from qrosa.processor import slow_in_16_bits

DESKTOP = "fpu sse4_2 avx avx2 fma f16c"
SERVER = DESKTOP + " avx512f avx512bw avx512dq avx512vl"
BF16 = SERVER + " avx512_bf16"
TILES = BF16 + " amx_bf16 amx_tile amx_int8"


def cpuinfo(vendor: str, flags: str) -> str:
    core = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\nbugs\t\t:\n\n"
    return core + core.replace(": 0", ": 1")


@pytest.mark.parametrize(
    ("vendor", "flags", "slow"),
    [
        ("GenuineIntel", DESKTOP, True),
        ("AuthenticAMD", DESKTOP, True),
        ("GenuineIntel", SERVER, True),
        ("GenuineIntel", BF16, True),
        ("AuthenticAMD", BF16, False),
        ("GenuineIntel", TILES, False),
    ],
)
def test_processors(vendor: str, flags: str, slow: bool) -> None:
    assert slow_in_16_bits(cpuinfo(vendor, flags)) is slow


def test_held_to_fewer_instructions() -> None:
    tiles = cpuinfo("GenuineIntel", TILES)
    assert [slow_in_16_bits(tiles, name) for name in ("amx", "avx512bf16", "avx2", "portable")] == [False, *[True] * 3]
    zen = cpuinfo("AuthenticAMD", BF16)
    assert [slow_in_16_bits(zen, name) for name in ("amx", "avx512bf16", "avx512")] == [False, False, True]


def test_the_names_are_the_kernels() -> None:
    """``QROSA_CPU_ISA`` means the same to both."""
    import torch

    from qrosa.processor import _KERNELS

    assert is_served("cpu")
    assert torch.ops.qrosa.cpu_isa(-1) < len(_KERNELS)
