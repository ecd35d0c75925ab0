"""The checks of these tests catch what they are for: kernels with one instruction changed must be found out.

Every barrier and every wait of the kernels below is taken away or weakened in turn: none is there for nothing either.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from conftest import Module
from ptx_cases import CASES
from ptx_memory import Fault
from ptx_program import NOTHING, Instruction, Kernel
from ptx_session import Session

RUNS = {case.name: case.run for case in CASES}
Change = Callable[[Instruction], Instruction]


def found_out(case: str, module: Module, kernel: Kernel, place: int, change: Change) -> bool:
    """Whether the case fails, or reports a fault, with one instruction of ``kernel`` changed."""
    changed = kernel.mutated(place, change(kernel.instructions[place]))
    session = Session({**module, kernel.name: changed})
    try:
        RUNS[case](session)
    except (Fault, AssertionError):
        return True
    return bool(session.faults)


def survivors(case: str, module: Module, kernel: str, opcode: str, change: Change) -> list[str]:
    """The changes that nobody notices."""
    found = [one for name, one in module.items() if re.search(rf"\d{kernel}", name)]
    assert found, kernel
    places = [(one, place) for one in found for place in one.where(opcode)]
    assert places, f"{kernel} has no {opcode}"
    return [
        f"{one.name}: {one.instructions[place]}"
        for one, place in places
        if not found_out(case, module, one, place, change)
    ]


BARRIERS = {
    "dequant_add bf16": "dequant_add_kernelINS_4Bf16E",
    "gather bf16": "gather_(index_kernel|kernelINS_4Bf16E)",
    "tiles bf16": "sddmm_tile_kernelINS_4Bf16E",
    "tiles fp32": "sddmm_wide_kernel",
    "score bf16": "score_kernelINS_4Bf16E",
    "score fp32": "score_wide_kernel",
    "spmm_rows bf16 1": "spmm_rows_kernelINS_4Bf16ELi1E",
    "spmm_rows fp32 4": "spmm_rows_kernelIfLi4E",
    "spmm_tensor bf16 2": "spmm_tensor_kernelINS_4Bf16ELi2E",
    "spmm_any bf16": "spmm_any_kernelINS_4Bf16E",
}


@pytest.mark.parametrize("case", BARRIERS)
def test_every_barrier_is_needed(case: str, modules: dict[str, Module]) -> None:
    assert not survivors(case, modules["89"], BARRIERS[case], r"^bar\.", lambda one: NOTHING)


def weakened(one: Instruction) -> Instruction:
    """A wait that lets one more group of copies be in flight."""
    return replace(one, operands=(str(int(one.operands[0]) + 1),))


@pytest.mark.parametrize("case", ["tiles bf16", "score bf16"])
def test_every_wait_is_needed(case: str, modules: dict[str, Module]) -> None:
    assert not survivors(case, modules["89"], BARRIERS[case], r"wait_group", weakened)


def without(part: str) -> Change:
    """The instruction without one part of its opcode."""
    return lambda one: replace(one, opcode=one.opcode.replace(f".{part}", "", 1))


def swapped(first: int, second: int) -> Change:
    """The instruction with two operands exchanged."""

    def change(one: Instruction) -> Instruction:
        operands = list(one.operands)
        operands[first], operands[second] = operands[second], operands[first]
        return replace(one, operands=tuple(operands))

    return change


def moved(operand: int, by: int) -> Change:
    """The instruction with the address in ``operand`` moved by so many bytes."""

    def change(one: Instruction) -> Instruction:
        match = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", one.operands[operand])
        assert match is not None
        operands = list(one.operands)
        operands[operand] = f"[{match[1]}+{int(match[2] or 0) + by}]"
        return replace(one, operands=tuple(operands))

    return change


def loosened(one: Instruction) -> Instruction:
    """A comparison that lets one more through."""
    return replace(one, opcode=one.opcode.replace("setp.ge", "setp.gt"))


@dataclass(frozen=True)
class Mutation:
    """Every instruction of a kernel that matches, changed one at a time."""

    name: str
    case: str
    kernel: str
    opcode: str
    change: Change


MUTATIONS = [
    Mutation("one entry past the end", "gather bf16", "gather_sum_kernel", r"^setp\.ge\.s64", loosened),
    Mutation("transposed loads as they lie", "score bf16", "score_kernelINS_4Bf16E", r"^ldmatrix", without("trans")),
    Mutation("a matrix row off by a piece", "score fp16", "score_kernelINS_4Fp16E", r"^ldmatrix", moved(1, 16)),
    Mutation("a matrix row misaligned", "gather fp16", "gather_kernelINS_4Fp16E", r"^ldmatrix", moved(1, 2)),
    Mutation("halves exchanged", "spmm_tensor bf16 1", "spmm_tensor_kernelINS_4Bf16ELi1E", r"^cvt.*x2", swapped(1, 2)),
    Mutation("results one element on", "dequant_add fp32", "dequant_add_kernelIf", r"^st\.global", moved(0, 4)),
    Mutation(
        "copies that never land", "tiles bf16", "sddmm_tile_kernelINS_4Bf16E", r"commit_group", lambda one: NOTHING
    ),
    Mutation("a sum without a lane", "spmm_any fp32", "spmm_any_kernelIf", r"^shfl", lambda one: NOTHING),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_small_faults_are_found_out(mutation: Mutation, modules: dict[str, Module]) -> None:
    assert not survivors(mutation.case, modules["89"], mutation.kernel, mutation.opcode, mutation.change)
