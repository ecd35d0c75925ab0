"""Runs a kernel's blocks one after another, all threads of a block at once, and reports what is wrong with it.

Threads at the smallest program counter run until they meet others or part ways, as a card's threads could: lanes that
diverge come together again where the code does. ``bar.sync`` lets a block go when all threads that have not left wait
there; operations of a warp let it go when all its lanes have come (those that left count as missing).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from ptx_access import copy, count_wavefronts, load, matrices, multiply, shuffle, store, wait
from ptx_memory import WARP, Fault, GlobalMemory, Ints, SharedMemory
from ptx_program import Instruction, Kernel
from ptx_values import Mask, Registers, Step, compute

Grid = tuple[int, int, int]
MOST_STEPS = 5_000_000  # of a block: more is a loop that does not end

_TOUCHES = {"ld": load, "st": store, "shfl": shuffle, "ldmatrix": matrices, "mma": multiply}
_TOGETHER = ("shfl", "ldmatrix", "mma")


class Machine:
    """One kernel with its arguments: ``found`` counts its faults, ``counts`` its work."""

    def __init__(
        self, kernel: Kernel, memory: GlobalMemory, arguments: Sequence[bytes], dynamic_shared: int = 0
    ) -> None:
        self.kernel, self.memory, self.threads = kernel, memory, kernel.threads
        self.registers = Registers(kernel)
        self.found: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.parameters = self._pack(arguments)
        self.constants = np.frombuffer(kernel.constants, np.uint8)
        self.shared_size = kernel.static_shared + dynamic_shared
        self.epoch, self.block_number = 0, 0
        self.committed = np.zeros(self.threads, np.int64)
        self.copies: list = []
        self.steps = [self._step(one) for one in kernel.instructions]

    def _pack(self, arguments: Sequence[bytes]) -> NDArray:
        size = max((offset + length for _, offset, length in self.kernel.parameters), default=0)
        packed = np.zeros(size, np.uint8)
        for (name, offset, length), value in zip(self.kernel.parameters, arguments, strict=True):
            assert len(value) == length, f"{name}: {len(value)} bytes for {length}"
            packed[offset : offset + length] = np.frombuffer(value, np.uint8)
        return packed

    def _step(self, one: Instruction) -> tuple[str, Callable[[Mask], Mask] | None, Step | int | None]:
        """How to run one instruction: its kind, its guard, and its function or its target."""
        guard = None
        if one.guard:
            predicate = self.registers.values[one.guard]
            guard = (lambda mask: mask & ~predicate) if one.negated else (lambda mask: mask & predicate)
        name = one.parts[0]
        if name == "bra":
            return "bra", guard, self.kernel.labels[one.operands[0]]
        if name in ("ret", "exit"):
            return "ret", guard, None
        if one.opcode == "bar.sync":
            return "barrier", guard, None
        if one.opcode == "bar.warp.sync":
            return "together", guard, self._meet
        kind = "together" if name in _TOGETHER else "plain"
        return kind, guard, self._function(one)

    def _function(self, one: Instruction) -> Step:
        if one.opcode.startswith("cp.async"):
            if "commit_group" in one.opcode:
                return self._commit
            return wait(self, one) if "wait_group" in one.opcode else copy(self, one)
        if one.opcode == "nothing":
            return lambda mask: None
        touch = _TOUCHES.get(one.parts[0])
        return touch(self, one) if touch is not None else compute(self.registers, one)

    def _commit(self, mask: Mask) -> None:
        self.committed[mask] += 1

    def _meet(self, mask: Mask) -> None:
        self.phases[np.unique(np.flatnonzero(mask) // WARP)] += 1

    # ---- memory -----------------------------------------------------------------------------------------------------

    def touch(self, space: str, addresses: Ints, size: int, threads: Ints, writes: bool, where: str) -> NDArray:
        """The bytes of a space, after the access has been checked and noted."""
        if space == "param":
            return self.parameters
        if space == "const":
            return self.constants
        if space == "shared":
            self.record_shared(self.shared.cells(addresses, size, where), threads, writes, where)
            count_wavefronts(self, addresses, size, threads, where)
            return self.shared.bytes
        self.counts["bytes written" if writes else "bytes read"] += size * threads.size
        if self.memory.check(addresses, size, writes, where):
            cells = (addresses[:, None] + np.arange(size)).ravel()
            repeated = np.repeat(threads, size)
            self.memory.record(cells, repeated, writes, self.block_number, self.epoch, where, self.found)
        return self.memory.bytes

    def record_shared(self, cells: Ints, threads: Ints, writes: bool, where: str) -> None:
        self.shared.record(cells, threads, writes, self.epoch, self.phases, where, self.found)

    # ---- running ----------------------------------------------------------------------------------------------------

    def run(self, grid: Grid, only: Grid | None = None) -> Machine:
        """Runs every block of ``grid``, or ``only`` one of them."""
        self.memory.next_kernel()
        self.registers.grid[:] = grid
        every = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        with np.errstate(all="ignore"):
            for place in [only] if only is not None else every:
                self.registers.block[:] = place
                self._block()
                self.block_number += 1
        return self

    def _block(self) -> None:
        self.shared = SharedMemory(self.shared_size)
        self.phases = np.zeros(-(-self.threads // WARP), np.int64)
        self.committed[:] = 0
        self.copies.clear()
        self.epoch += 1
        counter, left = np.zeros(self.threads, np.int64), np.zeros(self.threads, bool)
        at_barrier, for_warp = np.zeros(self.threads, bool), np.zeros(self.threads, bool)
        for _ in range(MOST_STEPS):
            ready = ~(left | at_barrier | for_warp)
            if ready.any():
                self._advance(counter, ready, left, at_barrier, for_warp)
            elif for_warp.any():
                places = {str(self.kernel.instructions[p]) for p in counter[for_warp]}
                raise Fault(f"lanes wait for others of their warp that never come: {sorted(places)}")
            elif left.all():
                break
            else:
                self._release(counter, at_barrier)
        else:
            raise Fault("the block does not end")
        if self.copies:
            self.found["an asynchronous copy is never waited for"] += 1

    def _release(self, counter: Ints, at_barrier: Mask) -> None:
        if np.unique(counter[at_barrier]).size > 1:
            self.found["threads of a block wait at different barriers"] += 1
        self.counts["barriers"] += 1
        self.epoch += 1
        self.phases += 1
        at_barrier[:] = False

    def _advance(self, counter: Ints, ready: Mask, left: Mask, at_barrier: Mask, for_warp: Mask) -> None:
        """Runs the threads at the smallest counter until they part, wait, leave or reach the next ones."""
        place = int(counter[ready].min())
        mask = ready & (counter == place)
        others = ready & ~mask
        limit = int(counter[others].min()) if others.any() else len(self.steps)
        warps = int(mask.reshape(-1, WARP).any(1).sum())
        while True:
            kind, guard, function = self.steps[place]
            self.counts["warp instructions"] += warps
            active = mask if guard is None else guard(mask)
            if kind == "plain":
                if active.any():
                    function(active)
                place += 1
                if place < limit:
                    continue
                counter[mask] = place
                return
            counter[mask] = place + 1
            if kind == "bra":
                counter[active] = function
            elif kind == "ret":
                left |= active
            elif kind == "barrier":
                at_barrier |= active
            else:
                self._together(place, active, counter, for_warp, function)
            return

    def _together(self, place: int, active: Mask, counter: Ints, for_warp: Mask, function: Step) -> None:
        """An operation of whole warps: those whose lanes have all come do it, the others wait."""
        counter[active] = place
        here = active | (for_warp & (counter == place))
        complete = np.repeat(here.reshape(-1, WARP).all(1), WARP)
        if (active & ~complete).any():
            self.found[f"{self.kernel.instructions[place]}: lanes of a warp arrive apart"] += 1
        for_warp |= here & ~complete
        going = here & complete
        for_warp &= ~going
        if going.any():
            function(going)
            counter[going] = place + 1
