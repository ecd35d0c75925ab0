"""Starting kernels on inputs made with torch, as the launchers of csrc/cuda do: views, parameters, grids."""

from __future__ import annotations

import re
import struct

import torch
from ptx_machine import Grid, Machine
from ptx_memory import GlobalMemory
from ptx_program import Kernel

from qrosa.ops import CsrOperands, NF4Operands

TYPES = {torch.bfloat16: "NS_4Bf16E", torch.float16: "NS_4Fp16E", torch.float32: "f"}
"""How each type is written in a kernel's mangled name."""


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def raw(tensor: torch.Tensor):  # type: ignore[no-untyped-def]
    """A tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


class Session:
    """Kernels run one after another on one memory, as on a stream."""

    def __init__(self, kernels: dict[str, Kernel]) -> None:
        self.kernels, self.memory = kernels, GlobalMemory()
        self.machines: list[Machine] = []

    def kernel(self, name: str, dtype: torch.dtype | None = None, size: int | None = None) -> Kernel:
        """The instantiation of a kernel for a type and a number of tokens or tiles."""
        pattern = rf"\d{name}" + (f"I{TYPES[dtype]}" if dtype else "") + (f"Li{size}E" if size else "")
        found = [kernel for mangled, kernel in self.kernels.items() if re.search(pattern, mangled)]
        assert len(found) == 1, f"{pattern}: {[kernel.name for kernel in found]}"
        return found[0]

    def start(self, kernel: Kernel, grid: Grid, *arguments: bytes, shared: int = 0) -> None:
        machine = Machine(kernel, self.memory, arguments, shared)
        self.machines.append(machine)
        machine.run(grid)

    def add(self, name: str, tensor: torch.Tensor, shift: int = 0) -> int:
        """The address of an input, ``shift`` elements off its natural alignment."""
        return self.memory.add(name, raw(tensor), shift * tensor.element_size())

    def room(self, name: str, count: int, dtype: torch.dtype, shift: int = 0) -> int:
        """The address of ``count`` values that kernels write before anybody reads them."""
        size = dtype.itemsize
        return self.memory.room(name, count * size, shift * size)

    def result(self, address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.memory.read(address, "u1", count * dtype.itemsize)), dtype=dtype)

    @property
    def faults(self) -> list[str]:
        """Everything found, with the kernel it was found in."""
        return [f"{m.kernel.name}: {what} ({times} times)" for m in self.machines for what, times in m.found.items()]


def int32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def int64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def flag(value: bool) -> bytes:
    return struct.pack("<?", value)


def nf4_view(session: Session, nf4: NF4Operands, shift: int = 0) -> bytes:
    """Nf4View (csrc/nf4.h) of operands, the codes ``shift`` bytes off."""
    codes = session.add("codes", nf4.codes, shift)
    absmax = session.add("absmax", nf4.absmax)
    if nf4.absmax_code is None:
        pointers = (codes, absmax, 0, 0, 0, 0)
    else:
        rest = (nf4.absmax_code, nf4.absmax_scale, nf4.absmax_offset)
        pointers = (codes, 0, absmax, *(session.add("nested", tensor.reshape(-1)) for tensor in rest))
    return struct.pack("<6Qi4x", *pointers, nf4.block_size.bit_length() - 1)


def csr_view(session: Session, csr: CsrOperands | None) -> bytes:
    """CsrView (csrc/csr.h)."""
    if csr is None:
        return bytes(40)
    pointers = [session.add(name, getattr(csr, name)) for name in ("row_ptr", "col", "values")]
    return struct.pack("<3Qq?7x", *pointers, csr.col.numel(), csr.col.dtype == torch.int32)


def operands(session: Session, dy: torch.Tensor, x: torch.Tensor, shift: int = 0) -> bytes:
    """Operands (tile_product.cuh); whole rows of 16 bytes only where both are aligned."""
    vector = shift == 0 and dy.shape[1] % 8 == 0 and x.shape[1] % 8 == 0
    pointers = session.add("dy", dy, shift), session.add("x", x, shift)
    return struct.pack("<2Q3q?7x", *pointers, x.shape[0], dy.shape[1], x.shape[1], vector)
