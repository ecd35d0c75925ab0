"""Registers, immediates and the instructions that only compute: one array operation for a whole block.

A register of a block is an array with an element a thread; a typed operand is a view of it. An instruction becomes a
function of the mask of active threads. Values are computed for all threads and kept for the active ones.
Source: PTX ISA 9.0, chapter 9.7 (instruction set), each family's "Semantics".
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from ptx_memory import Fault
from ptx_program import Instruction, Kernel

Mask = NDArray[np.bool_]
Step = Callable[[Mask], None]

DTYPES: dict[str, type] = {"pred": np.bool_, "f32": np.float32}
for _bits in (8, 16, 32, 64):
    DTYPES |= {f"{kind}{_bits}": getattr(np, f"uint{_bits}") for kind in "bu"} | {
        f"s{_bits}": getattr(np, f"int{_bits}")
    }

_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_COMPARE |= {"ge": np.greater_equal}
_BINARY = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_BINARY |= {"min": np.fmin, "max": np.fmax, "mul": np.multiply}
_UNARY = {"rcp": lambda x: np.float32(1) / x, "sqrt": np.sqrt, "ex2": lambda x: np.exp2(x.astype(np.float64))}
_WIDE = {"u16": np.uint32, "s16": np.int32, "u32": np.uint64, "s32": np.int64}


def bf16_bits(values: NDArray) -> NDArray:
    """fp32 to bf16, to nearest even, as bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def fp16_bits(values: NDArray) -> NDArray:
    """fp32 to fp16, to nearest even, as bits."""
    return values.astype(np.float32).astype(np.float16).view(np.uint16)


class Registers:
    """The registers of one block, and its place in the grid."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.threads = kernel, kernel.threads
        self.block, self.grid = np.zeros(3, np.uint32), np.ones(3, np.uint32)
        self.values: dict[str, NDArray] = {}
        for prefix, (kind, count) in kernel.registers.items():
            dtype = DTYPES[kind]
            self.values |= {f"{prefix}{i}": np.zeros(self.threads, dtype) for i in range(count)}
        self.values["%tid.x"] = np.arange(self.threads, dtype=np.uint32)
        for axis, name in enumerate("xyz"):
            self.values[f"%ctaid.{name}"] = self.block[axis : axis + 1]
            self.values[f"%nctaid.{name}"] = self.grid[axis : axis + 1]

    def view(self, name: str, dtype: type) -> NDArray:
        """A register as another type of its width."""
        values = self.values[name]
        return values if values.dtype == dtype else values.view(dtype)

    def source(self, operand: str, dtype: type) -> Callable[[], NDArray]:
        """An operand's values as ``dtype``; of a wider register, the low bits."""
        size = np.dtype(dtype).itemsize
        if operand in self.values:
            values = self.values[operand]
            if values.dtype == np.bool_ or values.dtype.itemsize == size:
                view = self.view(operand, dtype)
                return lambda: view
            if values.dtype.itemsize > size:
                return lambda: values.astype(f"u{size}").view(dtype)
            raise Fault(f"{operand} is narrower than {np.dtype(dtype)}")
        constant = self._immediate(operand, dtype)
        return lambda: constant

    def _immediate(self, operand: str, dtype: type) -> NDArray:
        if operand in self.kernel.symbols:
            return np.full(1, self.kernel.symbols[operand], dtype)
        if operand.startswith("0f"):
            bits = np.array([int(operand[2:], 16)], np.uint32)
            return bits.view(np.float32) if dtype == np.float32 else bits.astype(dtype)
        size = np.dtype(dtype).itemsize
        wrapped = int(operand, 0) & ((1 << (8 * size)) - 1)
        return np.frombuffer(struct.pack("<Q", wrapped)[:size], np.dtype(dtype))

    def target(self, name: str) -> Callable[[Mask, NDArray], None]:
        """Writes values to a register for the active threads; a narrower value is extended as its type says."""
        register = self.values[name]
        width = register.dtype.itemsize

        def write(mask: Mask, values: NDArray) -> None:
            if register.dtype != np.bool_:
                if values.dtype.itemsize != width:
                    values = values.astype(f"{'i' if values.dtype.kind == 'i' else 'u'}{width}")
                values = values.view(register.dtype)
            np.copyto(register, values, where=mask)

        return write


def compute(registers: Registers, one: Instruction) -> Step:
    """The function of an instruction that touches neither memory nor other threads."""
    parts, operands = one.parts, one.operands
    name, kind = parts[0], parts[-1]
    special = {"mov": _mov, "cvta": _mov, "cvt": _cvt, "prmt": _prmt, "bfi": _bfi, "selp": _selp}
    if name in special:
        return special[name](registers, one)
    dtype = DTYPES[kind]
    write = registers.target(operands[0])
    if name == "setp":
        return _applied(write, _COMPARE[parts[1]], *(registers.source(operand, dtype) for operand in operands[1:]))
    if name in ("shl", "shr"):
        sources = registers.source(operands[1], dtype), registers.source(operands[2], np.uint32)
        return _applied(write, _shift_left if name == "shl" else _shift_right, *sources)
    if name in ("mul", "mad") and parts[1] == "wide":
        return _wide(registers, one)
    sources = tuple(registers.source(operand, dtype) for operand in operands[1:])
    if name == "mad" and parts[1] == "lo":
        return _applied(write, lambda a, b, c: a * b + c, *sources)
    if name in _UNARY:
        return _applied(write, lambda a: _UNARY[name](a).astype(np.float32), *sources)
    if name == "fma" and parts[1] == "rm":
        return _applied(write, _fma_down, *sources)
    if name == "fma":  # exact in fp64 but for the last bit of a sum that cancels
        return _applied(write, lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32), *sources)
    if name == "div":
        return _applied(write, np.divide if kind == "f32" else _divide, *sources)
    if name in ("not", "neg"):
        return _applied(write, np.invert if name == "not" else np.negative, *sources)
    if name in _BINARY and not (name == "mul" and parts[1] == "hi"):
        return _applied(write, _BINARY[name], *sources)
    raise Fault(f"{one}: not transcribed")


def _applied(write: Callable, function: Callable, *sources: Callable) -> Step:
    return lambda mask: write(mask, np.asarray(function(*(source() for source in sources))))


def _shift_left(values: NDArray, by: NDArray) -> NDArray:
    bits = 8 * values.dtype.itemsize
    shifted = values << np.minimum(by, bits - 1).astype(values.dtype)
    return np.where(by >= bits, np.zeros(1, values.dtype), shifted)


def _shift_right(values: NDArray, by: NDArray) -> NDArray:
    """Of signed values the sign fills up, however far they are shifted."""
    bits = 8 * values.dtype.itemsize
    shifted = values >> np.minimum(by, bits - 1).astype(values.dtype)
    return shifted if values.dtype.kind == "i" else np.where(by >= bits, np.zeros(1, values.dtype), shifted)


def _fma_down(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    """a b + c, rounded towards minus infinity."""
    exact = a.astype(np.float64) * b + c
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def _divide(a: NDArray, b: NDArray) -> NDArray:
    """Towards zero; what a division by zero gives is not defined, here 0."""
    divisor = np.where(b == 0, np.ones(1, b.dtype), b)
    quotient = (a // divisor).astype(a.dtype)
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * divisor != a)).astype(a.dtype)
    return np.where(b == 0, np.zeros(1, a.dtype), quotient)


def _wide(registers: Registers, one: Instruction) -> Step:
    """Products twice as wide as their factors, with a third operand of that width to add."""
    narrow, wide = DTYPES[one.parts[-1]], _WIDE[one.parts[-1]]
    a, b = (registers.source(operand, narrow) for operand in one.operands[1:3])
    write = registers.target(one.operands[0])
    if one.parts[0] == "mul":
        return _applied(write, lambda x, y: x.astype(wide) * y.astype(wide), a, b)
    c = registers.source(one.operands[3], wide)
    return _applied(write, lambda x, y, z: x.astype(wide) * y.astype(wide) + z, a, b, c)


def split(operand: str) -> list[str]:
    """The names within braces, or the one name."""
    return [name.strip() for name in operand.strip("{}").split(",")]


def _mov(registers: Registers, one: Instruction) -> Step:
    """Plain, packing ``mov.b32 %r, {%rs1, %rs2}`` (the first lowest) or unpacking."""
    target, source = one.operands
    dtype = np.uint64 if one.parts[0] == "cvta" else DTYPES[one.parts[-1]]
    if source.startswith("{"):
        names = split(source)
        part = np.dtype(f"u{np.dtype(dtype).itemsize // len(names)}").type
        parts = [registers.source(name, part) for name in names]
        return _applied(registers.target(target), lambda *values: _together(values, dtype), *parts)
    values = registers.source(source, dtype)
    if not target.startswith("{"):
        return _applied(registers.target(target), lambda value: value, values)
    names = split(target)
    part = np.dtype(f"u{np.dtype(dtype).itemsize // len(names)}")
    writers = [registers.target(name) if name != "_" else None for name in names]

    def unpack(mask: Mask) -> None:
        pieces = np.ascontiguousarray(values()).view(part).reshape(-1, len(names))
        for i, write in enumerate(writers):
            if write is not None:
                write(mask, np.ascontiguousarray(pieces[:, i]))

    return unpack


def _together(values: tuple[NDArray, ...], dtype: type) -> NDArray:
    """Narrow values side by side in wider ones, the first lowest."""
    return np.ascontiguousarray(np.stack(np.broadcast_arrays(*values), 1)).view(dtype).ravel()


def _cvt(registers: Registers, one: Instruction) -> Step:
    write, parts = registers.target(one.operands[0]), one.parts
    if parts[1] == "sat":
        values = registers.source(one.operands[1], np.float32)
        return _applied(write, lambda value: np.nan_to_num(value, nan=0.0).clip(0, 1), values)
    if parts[-1] == "f32":  # cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half
        rounded = bf16_bits if "bf16" in parts[2] else fp16_bits
        sources = [registers.source(operand, np.float32) for operand in one.operands[1:]]
        if parts[2].endswith("x2"):
            return _applied(write, lambda high, low: rounded(high).astype(np.uint32) << 16 | rounded(low), *sources)
        return _applied(write, rounded, *sources)
    if parts[-1] == "f16":
        halves = registers.source(one.operands[1], np.uint16)
        return _applied(write, lambda value: value.view(np.float16).astype(np.float32), halves)
    to = DTYPES[parts[-2]]
    return _applied(write, lambda value: value.astype(to), registers.source(one.operands[1], DTYPES[parts[-1]]))


def _selp(registers: Registers, one: Instruction) -> Step:
    a, b = (registers.source(operand, DTYPES[one.parts[-1]]) for operand in one.operands[1:3])
    return _applied(
        registers.target(one.operands[0]),
        lambda x, y, p: np.where(p, x, y),
        a,
        b,
        registers.source(one.operands[3], np.bool_),
    )


def _prmt(registers: Registers, one: Instruction) -> Step:
    """Four bytes out of eight, each named by a nibble below 8 (the sign-spreading forms are not used)."""

    def permute(a: NDArray, b: NDArray, selector: NDArray) -> NDArray:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.zeros(1, np.uint32)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            if (nibble >= 8).any():
                raise Fault(f"{one}: not transcribed")
            byte = (both >> (nibble * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
            result = result | byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    sources = [registers.source(operand, np.uint32) for operand in one.operands[1:]]
    return _applied(registers.target(one.operands[0]), permute, *sources)


def _bfi(registers: Registers, one: Instruction) -> Step:
    """bfi.b32 d, a, b, start, length: the low bits of a into b."""

    def insert(a: NDArray, b: NDArray, start: NDArray, length: NDArray) -> NDArray:
        field = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << start.astype(np.uint64)
        return (b & ~field.astype(np.uint32)) | ((a << start) & field.astype(np.uint32))

    sources = [registers.source(operand, np.uint32) for operand in one.operands[1:]]
    return _applied(registers.target(one.operands[0]), insert, *sources)
