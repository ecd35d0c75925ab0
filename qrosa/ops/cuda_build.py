"""What the CUDA library was built for, and whether the driver and the cards here can use it.

Read from the file before it is loaded: loading registers its kernels, and a card that they do not serve would then fail
at its first op ("no kernel image is available"), where plain PyTorch would have served it. The library holds machine
code (``sm_``) for some cards, which newer cards of the same generation run too, and PTX (``compute_``) that a driver
compiles for every card from there on. It carries its own CUDA runtime, and a driver of an older major version runs none
of it.

Sources: CUDA C++ Programming Guide, "Compute Capabilities" and "Application Compatibility"; CUDA Compatibility guide.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST_CARD = (8, 0)
"""The kernels need bf16 tensor cores and asynchronous copies, which came with compute capability 8.0 (Ampere)."""

_TEXT = re.compile(rb"qrosa-cuda-build runtime=(\d+) targets=([\w ]+);")

Card = tuple[int, int]
"""A card's compute capability, as (major, minor)."""


@dataclass(frozen=True)
class Refusal:
    """Why a library is not used, and what to do about it."""

    reason: str
    fix: str


@dataclass(frozen=True)
class CudaBuild:
    """What a library was built with and for."""

    runtime: int
    """The CUDA runtime inside, as 1000 * major + 10 * minor."""
    cubins: tuple[Card, ...]
    """Cards with machine code."""
    ptx: tuple[Card, ...]
    """Cards from which on a driver can compile the kernels."""

    @staticmethod
    def read(library: Path) -> CudaBuild | None:
        """The build of a library file; None for one that does not say."""
        found = _TEXT.search(library.read_bytes())
        if found is None:
            return None
        targets = found[2].decode().split()
        return CudaBuild(int(found[1]), _cards(targets, "sm_"), _cards(targets, "compute_"))

    def serves(self, card: Card, driver: int) -> bool:
        """Whether a card with a driver for CUDA version ``driver`` runs the kernels."""
        machine_code = any(major == card[0] and minor <= card[1] for major, minor in self.cubins)
        return machine_code or (driver >= self.runtime and any(first <= card for first in self.ptx))

    def refusal(self, driver: int, cards: Sequence[Card]) -> Refusal | None:
        """Why the library cannot serve all of ``cards``; None where it can."""
        if driver // 1000 < self.runtime // 1000:
            reason = (
                f"the driver is for CUDA {_version(driver)}, the library is built with CUDA {_version(self.runtime)}"
            )
            return Refusal(reason, f"update the driver, or rebuild with CUDA {driver // 1000}'s nvcc on the PATH")
        unserved = [card for card in cards if not self.serves(card, driver)]
        if not unserved:
            return None
        card = min(unserved)
        if card < OLDEST_CARD:
            return Refusal(f"the kernels need a card of sm_80 or newer, this one is {_name(card)}", "use a newer card")
        built = ", ".join(_name(one) for one in self.cubins)
        fix = f"rebuild with QROSA_CUDA_ARCHS={_name(card)[3:]} in the environment and a recent nvcc on the PATH"
        return Refusal(f"the library is built for {built}, this card is {_name(card)}", fix)


@dataclass(frozen=True)
class Machine:
    """The driver of this machine, as 1000 * major + 10 * minor of its CUDA version, and its visible cards."""

    driver: int
    cards: tuple[Card, ...]

    @staticmethod
    def here() -> Machine | None:
        """Asks the driver itself; None where it does not answer.

        Not through torch.cuda, which would set up its allocator at import, before anybody could choose its settings.
        """
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None
        version, count = ctypes.c_int(), ctypes.c_int()
        if driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(version)):
            return None
        if driver.cuDeviceGetCount(ctypes.byref(count)):
            return None
        return Machine(version.value, tuple(_capability(driver, index) for index in range(count.value)))


def _capability(driver: ctypes.CDLL, index: int) -> Card:
    device, value = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)

    def attribute(number: int) -> int:
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return attribute(75), attribute(76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def _cards(targets: list[str], prefix: str) -> tuple[Card, ...]:
    numbers = [int(target.removeprefix(prefix)) for target in targets if target.startswith(prefix)]
    return tuple((number // 10, number % 10) for number in numbers)


def _name(card: Card) -> str:
    return f"sm_{card[0]}{card[1]}"


def _version(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"
