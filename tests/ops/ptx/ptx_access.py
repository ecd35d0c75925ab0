"""Instructions that touch memory or other lanes, with every access checked on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from ptx_exchange import loaded_matrices, product, shuffled
from ptx_memory import WARP, Fault, Ints, wavefronts
from ptx_program import BYTES, Instruction
from ptx_values import DTYPES, Mask, Step, split

if TYPE_CHECKING:
    from ptx_machine import Machine


@dataclass
class Copy:
    """Asynchronous copies of one instruction that have not landed: 16 bytes a thread."""

    threads: Ints
    cells: Ints
    targets: Ints
    data: NDArray
    groups: Ints
    """How many groups each thread had committed before."""
    flying: Mask


def address_of(machine: Machine, operand: str) -> Callable[[Ints], Ints]:
    """The address of ``[register+offset]`` or ``[symbol+offset]`` for given threads."""
    match = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", operand)
    assert match is not None, operand
    base, offset = match[1], int(match[2] or 0)
    if base in machine.registers.values:
        register = machine.registers.values[base]
        return lambda threads: register[threads].astype(np.int64) + offset
    place = machine.kernel.symbols[base] + offset
    return lambda threads: np.full(threads.size, place, np.int64)


def load(machine: Machine, one: Instruction) -> Step:
    """ld.{param,const,shared,global}[.nc][.v2|.v4].type: into one register or several."""
    space, kind = one.parts[1], one.parts[-1]
    address = address_of(machine, one.operands[1])
    names = split(one.operands[0])
    writers = [machine.registers.target(name) for name in names]
    dtype, size = np.dtype(DTYPES[kind]), BYTES[kind] * len(names)
    spread = np.zeros(machine.threads, dtype)

    def step(mask: Mask) -> None:
        threads = np.flatnonzero(mask)
        addresses = address(threads)
        source = machine.touch(space, addresses, size, threads, False, str(one))
        values = source[addresses[:, None] + np.arange(size)].view(dtype)
        for i, write in enumerate(writers):
            spread[threads] = values[:, i]
            write(mask, spread)

    return step


def store(machine: Machine, one: Instruction) -> Step:
    """st.{shared,global}[.v2|.v4].type."""
    space, kind = one.parts[1], one.parts[-1]
    address = address_of(machine, one.operands[0])
    sources = [machine.registers.source(name, DTYPES[kind]) for name in split(one.operands[1])]
    size = BYTES[kind] * len(sources)

    def step(mask: Mask) -> None:
        threads = np.flatnonzero(mask)
        addresses = address(threads)
        values = np.stack([np.broadcast_to(source(), machine.threads)[threads] for source in sources], 1)
        target = machine.touch(space, addresses, size, threads, True, str(one))
        target[addresses[:, None] + np.arange(size)] = np.ascontiguousarray(values).view(np.uint8)

    return step


def copy(machine: Machine, one: Instruction) -> Step:
    """cp.async.cg.shared.global [to], [from], 16, bytes: the rest of the 16 bytes is zero, and 0 reads nothing."""
    to, source = address_of(machine, one.operands[0]), address_of(machine, one.operands[1])
    count = machine.registers.source(one.operands[3], np.uint32)

    def step(mask: Mask) -> None:
        threads = np.flatnonzero(mask)
        targets, addresses = to(threads), source(threads)
        sizes = np.broadcast_to(count(), machine.threads)[threads]
        if not np.isin(sizes, (0, 16)).all():
            raise Fault(f"{one}: copies of part of 16 bytes are not transcribed")
        present = sizes == 16
        data = np.zeros((threads.size, 16), np.uint8)
        if present.any():
            memory = machine.touch("global", addresses[present], 16, threads[present], False, str(one))
            data[present] = memory[addresses[present][:, None] + np.arange(16)]
        cells = machine.shared.cells(targets, 16, str(one))
        machine.record_shared(cells, threads, True, str(one))
        machine.shared.pending[cells] += 1
        machine.copies.append(
            Copy(threads, cells, targets, data, machine.committed[threads].copy(), np.ones(threads.size, bool))
        )

    return step


def wait(machine: Machine, one: Instruction) -> Step:
    """cp.async.wait_group n: all but a thread's last n committed groups have landed."""
    left = int(one.operands[0])

    def step(mask: Mask) -> None:
        for flight in machine.copies:
            landed = flight.flying & mask[flight.threads]
            landed &= flight.groups < machine.committed[flight.threads] - left
            if landed.any():
                machine.shared.pending[flight.cells[landed]] -= 1
                machine.shared.bytes[flight.targets[landed][:, None] + np.arange(16)] = flight.data[landed]
                machine.record_shared(flight.cells[landed], flight.threads[landed], True, f"{one}, landing")
                flight.flying &= ~landed
        machine.copies = [flight for flight in machine.copies if flight.flying.any()]

    return step


def shuffle(machine: Machine, one: Instruction) -> Step:
    """shfl.sync.{idx,bfly}.b32 d[|p], a, lane, 0x1f, mask: over the whole warp."""
    mode = one.parts[2]
    registers = machine.registers
    write = registers.target(one.operands[0].split("|")[0])
    values, lane = registers.source(one.operands[1], np.uint32), registers.source(one.operands[2], np.uint32)
    clamp, members = registers.source(one.operands[3], np.uint32), registers.source(one.operands[4], np.uint32)

    def step(mask: Mask) -> None:
        clamps, whole = (np.broadcast_to(source(), machine.threads)[mask] for source in (clamp, members))
        if (clamps != 31).any() or (whole != 0xFFFFFFFF).any():
            raise Fault(f"{one}: only whole warps are transcribed")
        rows = [np.broadcast_to(source(), machine.threads).reshape(-1, WARP) for source in (values, lane)]
        write(mask, shuffled(rows[0], rows[1].astype(np.int64), mode).ravel())

    return step


def matrices(machine: Machine, one: Instruction) -> Step:
    """ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lane i names row i % 8 of matrix i / 8."""
    writers = [machine.registers.target(name) for name in split(one.operands[0])]
    address = address_of(machine, one.operands[1])
    transposed = "trans" in one.parts
    spread = np.zeros(machine.threads, np.uint32)

    def step(mask: Mask) -> None:
        threads = np.flatnonzero(mask)
        addresses = address(threads)
        source = machine.touch("shared", addresses, 16, threads, False, str(one))
        rows = source[addresses[:, None] + np.arange(16)].view(np.uint16).reshape(-1, 4, 8, 8)
        for write, words in zip(writers, loaded_matrices(rows, transposed), strict=True):
            spread[threads] = words.ravel()
            write(mask, spread)

    return step


def multiply(machine: Machine, one: Instruction) -> Step:
    """mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32."""
    if "m16n8k16" not in one.parts or one.parts[-1] != "f32":
        raise Fault(f"{one}: not transcribed")
    registers = machine.registers
    writers = [registers.target(name) for name in split(one.operands[0])]
    a, b = ([registers.source(name, np.uint32) for name in split(operand)] for operand in one.operands[1:3])
    c = [registers.source(name, np.float32) for name in split(one.operands[3])]
    bf16 = "bf16" in one.parts

    def step(mask: Mask) -> None:
        rows = [[np.broadcast_to(s(), machine.threads).reshape(-1, WARP) for s in operand] for operand in (a, b, c)]
        machine.counts["mma"] += int(mask.sum()) // WARP
        for write, values in zip(writers, product(*rows, bf16=bf16), strict=True):
            write(mask, values.ravel())

    return step


def count_wavefronts(machine: Machine, addresses: Ints, size: int, threads: Ints, where: str) -> None:
    """Notes the passes of one access to shared memory, matrix loads apart from the rest."""
    taken, least = wavefronts(addresses, size, threads)
    kind = "matrix" if where.startswith("ldmatrix") else "shared"
    machine.counts[f"{kind} wavefronts"] += taken
    machine.counts[f"{kind} least"] += least
