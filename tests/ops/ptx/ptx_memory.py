"""The memory that a kernel sees, with what no card tells: who wrote and read each byte, and when.

Time is counted in epochs: a block's barrier begins a new one, and each warp counts its own ``bar.warp.sync`` besides
("phases"). Two accesses to one byte by different threads, one of them a write, are a race unless a barrier that both
took part in lies between: an epoch apart, or a phase apart within one warp. That holds whatever order the threads ran
in, so a race is found even where the values come out right.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
WARP = 32
PAGE = 256


class Fault(Exception):
    """What a card would stop at, or read from somebody else's memory."""


class GlobalMemory:
    """Allocations with nothing between them that may be touched."""

    def __init__(self, size: int = 1 << 22) -> None:
        self.bytes = np.full(size, 0xCD, np.uint8)
        self.owner = np.zeros(size, np.int16)  # the allocation of each byte; 0 belongs to nobody
        self.written = np.zeros(size, bool)
        self.writer = np.full(size, -1, np.int64)  # block * 2^20 + thread
        self.write_epoch = np.full(size, -1, np.int64)
        self.reader = np.full(size, -1, np.int64)  # the first and the last block that read the byte
        self.last_reader = np.full(size, -1, np.int64)
        self.names = ["nobody"]
        self.outputs: list[bool] = [False]
        self.top = PAGE

    def add(self, name: str, values: NDArray, shift: int = 0) -> int:
        """The address of a copy of ``values``, ``shift`` bytes past a 256-byte boundary. Kernels only read it."""
        raw = np.ascontiguousarray(values).view(np.uint8).ravel()
        address = self._place(name, raw.size, shift, output=False)
        self.bytes[address : address + raw.size] = raw
        self.written[address : address + raw.size] = True
        return address

    def room(self, name: str, size: int, shift: int = 0, values: NDArray | None = None) -> int:
        """The address of ``size`` bytes that kernels may write; nothing to be read there unless ``values`` say."""
        address = self._place(name, size, shift, output=True)
        if values is not None:
            self.bytes[address : address + size] = np.ascontiguousarray(values).view(np.uint8).ravel()
            self.written[address : address + size] = True
        return address

    def _place(self, name: str, size: int, shift: int, output: bool) -> int:
        address = self.top + shift
        self.owner[address : address + size] = len(self.names)
        self.names.append(name)
        self.outputs.append(output)
        self.top = -(-(address + size + 1) // PAGE) * PAGE
        return address

    def read(self, address: int, dtype: np.dtype | type, count: int) -> NDArray:
        """What lies there now."""
        return np.frombuffer(self.bytes[address : address + count * np.dtype(dtype).itemsize].tobytes(), dtype)

    def next_kernel(self) -> None:
        """A kernel begins: all that the one before wrote is there for every block."""
        for record in (self.writer, self.write_epoch, self.reader, self.last_reader):
            record.fill(-1)

    def check(self, addresses: Ints, size: int, writes: bool, where: str) -> bool:
        """Stops at an access outside an allocation or misaligned. Returns whether it touches what kernels write."""
        if (addresses % size).any():
            raise Fault(f"{where}: misaligned for {size} bytes")
        if addresses.min() < 0 or addresses.max() + size > self.bytes.size:
            raise Fault(f"{where}: outside memory")
        owners = self.owner[addresses]
        if (owners == 0).any() or (owners != self.owner[addresses + size - 1]).any():
            raise Fault(f"{where}: outside every allocation, beside {self.names[int(owners.max())]}")
        owners = np.unique(owners)
        if writes and not all(self.outputs[owner] for owner in owners):
            raise Fault(f"{where}: writes to an input")
        return any(self.outputs[owner] for owner in owners)

    def record(
        self, cells: Ints, threads: Ints, writes: bool, block: int, epoch: int, where: str, found: Counter[str]
    ) -> None:
        """Notes an access of ``threads`` to bytes ``cells`` and counts what is wrong with it in ``found``."""
        mine = threads + (block << 20)
        writer = self.writer[cells]
        foreign = (writer >= 0) & ((writer >> 20) != block)
        if foreign.any():
            found[f"{where}: another block wrote it"] += 1
        if ((writer >= 0) & ~foreign & (writer != mine) & (self.write_epoch[cells] == epoch)).any():
            found[f"{where}: another thread wrote it without a barrier between"] += 1
        if writes:
            if ((self.reader[cells] >= 0) & ((self.reader[cells] != block) | (self.last_reader[cells] != block))).any():
                found[f"{where}: another block has read it"] += 1
            if np.unique(cells).size != cells.size:
                found[f"{where}: two lanes write one byte"] += 1
            self.writer[cells], self.write_epoch[cells], self.written[cells] = mine, epoch, True
            return
        if not self.written[cells].all():
            found[f"{where}: reads what nobody wrote"] += 1
        self.reader[cells] = np.where(self.reader[cells] < 0, block, self.reader[cells])
        self.last_reader[cells] = block


class SharedMemory:
    """One block's shared memory, tracked in cells of two bytes (the smallest access of csrc/cuda)."""

    CELL = 2

    def __init__(self, size: int) -> None:
        cells = -(-size // self.CELL)
        self.bytes = np.full(size, 0xCD, np.uint8)  # what the block before left
        self.written = np.zeros(cells, bool)
        self.pending = np.zeros(cells, np.int32)  # asynchronous copies on their way here
        self.write = {key: np.full(cells, -1, np.int64) for key in ("epoch", "thread", "phase")}
        self.reads = {key: np.full(cells, -1, np.int64) for key in ("epoch", "low", "high", "phase", "first", "last")}

    def cells(self, addresses: Ints, size: int, where: str) -> Ints:
        """The cells of each access, [accesses, cells]; stops at one outside or misaligned."""
        if (addresses % size).any():
            raise Fault(f"{where}: misaligned for {size} bytes of shared memory")
        if addresses.min() < 0 or addresses.max() + size > self.bytes.size:
            raise Fault(f"{where}: outside shared memory of {self.bytes.size} bytes, at {addresses.max()}")
        return addresses[:, None] // self.CELL + np.arange(max(size // self.CELL, 1))

    def record(
        self, cells: Ints, threads: Ints, writes: bool, epoch: int, phases: Ints, where: str, found: Counter[str]
    ) -> None:
        """Notes an access, ``cells`` [accesses, cells] of ``threads`` [accesses], and counts its faults."""
        thread = np.repeat(threads, cells.shape[1])
        cell, warp = cells.ravel(), thread // WARP
        phase = phases[warp]
        if self.pending[cell].any():
            found[f"{where}: an asynchronous copy to it is not waited for"] += 1
        writer = self.write["thread"][cell]
        earlier = (writer >= 0) & (self.write["epoch"][cell] == epoch)
        if (earlier & (writer // WARP != warp)).any():
            found[f"{where}: another warp wrote it without a barrier between"] += 1
        if (earlier & (writer // WARP == warp) & (writer != thread) & (self.write["phase"][cell] == phase)).any():
            found[f"{where}: another lane wrote it without bar.warp.sync between"] += 1
        if writes:
            self._check_readers(cell, thread, warp, epoch, phase, where, found)
            if np.unique(cell).size != cell.size:
                found[f"{where}: two lanes write one place"] += 1
            self.write["epoch"][cell], self.write["thread"][cell], self.write["phase"][cell] = epoch, thread, phase
            self.written[cell] = True
        else:
            if not self.written[cell].all():
                found[f"{where}: reads what nobody wrote"] += 1
            self._note_readers(cell, thread, warp, epoch, phase)

    def _check_readers(self, cell, thread, warp, epoch, phase, where, found) -> None:  # type: ignore[no-untyped-def]
        reads = {key: values[cell] for key, values in self.reads.items()}
        earlier = reads["epoch"] == epoch
        if (earlier & ((reads["low"] != warp) | (reads["high"] != warp))).any():
            found[f"{where}: another warp reads it without a barrier between"] += 1
        mine = earlier & (reads["low"] == warp) & (reads["high"] == warp) & (reads["phase"] == phase)
        if (mine & ((reads["first"] != thread) | (reads["last"] != thread))).any():
            found[f"{where}: another lane reads it without bar.warp.sync between"] += 1

    def _note_readers(self, cell, thread, warp, epoch, phase) -> None:  # type: ignore[no-untyped-def]
        """Keeps the range of warps that read a cell in this epoch, and the range of threads in this phase."""
        reads = self.reads
        new = cell[reads["epoch"][cell] != epoch]
        reads["low"][new], reads["high"][new], reads["phase"][new] = 1 << 30, -1, -1
        fresh = cell[reads["phase"][cell] != phase]
        reads["first"][fresh], reads["last"][fresh] = 1 << 30, -1
        np.minimum.at(reads["low"], cell, warp)
        np.maximum.at(reads["high"], cell, warp)
        np.minimum.at(reads["first"], cell, thread)
        np.maximum.at(reads["last"], cell, thread)
        reads["epoch"][cell], reads["phase"][cell] = epoch, phase


def wavefronts(addresses: Ints, size: int, threads: Ints) -> tuple[int, int]:
    """Passes that shared memory needs for one access of a block's warps, and how many there are without conflicts.

    32 banks of 4 bytes; a warp goes at once up to 4 bytes a lane, in halves at 8 and in quarters at 16. Lanes that read
    one word are served together.
    """
    lanes = {8: 16, 16: 8}.get(size, 32)
    groups = threads // lanes
    words = addresses[:, None] // 4 + np.arange(max(size // 4, 1))
    keys = np.unique(np.repeat(groups, words.shape[1]) << 40 | words.ravel())
    group, bank = keys >> 40, keys & 31
    counts = np.bincount(group * 32 + bank, minlength=(int(group.max()) + 1) * 32).reshape(-1, 32)
    return int(counts.max(1).sum()), np.unique(groups).size
