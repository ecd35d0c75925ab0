"""The checks of these tests catch what they are for: kernels with one instruction changed must be found out.

Every barrier and every wait of the kernels below is taken away or weakened in turn: none is there for nothing either.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

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


def loosened(one: Instruction) -> Instruction:
    """A comparison that lets one more through."""
    return replace(one, opcode=one.opcode.replace("setp.ge", "setp.gt"))


def test_one_entry_past_the_end(modules: dict[str, Module]) -> None:
    assert not survivors("gather bf16", modules["89"], "gather_sum_kernel", r"^setp\.ge\.s64", loosened)
