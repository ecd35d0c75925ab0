"""The CUDA kernels as nvcc emits them, run thread by thread without a card.

Stronger than the emulator of ``tests/ops/emulator``, which compiles the source for the CPU: here the inline assembly,
its constraints and what the compiler reorders are run too, and a race is found by what synchronises it and not by a
wrong value. What ptxas makes of PTX, and whether a card does what its manual says, only a card can show.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from conftest import Module
from ptx_bounds import LOOSE, bank_conflicts, instructions
from ptx_cases import CASES, Case
from ptx_session import Session

ARCHS = ("86", "89", "90")
_finished: dict[tuple[str, int], Session] = {}


def finished(case: Case, module: Module) -> Session:
    """The case's run, which also holds results against the reference; once for cards that share their PTX."""
    key = case.name, id(module)
    if key not in _finished:
        _finished[key] = Session(module)
        case.run(_finished[key])
    return _finished[key]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_right_and_nothing_found(case: Case, arch: str, modules: dict[str, Module]) -> None:
    """No race, no read of what nobody wrote, no access outside or misaligned, no lanes that arrive apart."""
    assert not finished(case, modules[arch]).faults


@pytest.mark.parametrize("arch", ARCHS)
def test_every_instantiation_is_run(arch: str, modules: dict[str, Module]) -> None:
    run = {machine.kernel.name for case in CASES for machine in finished(case, modules[arch]).machines}
    assert run == set(modules[arch])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_instructions_and_bank_conflicts(case: Case, arch: str, modules: dict[str, Module]) -> None:
    machines = finished(case, modules[arch]).machines
    total = sum((machine.counts for machine in machines), Counter())
    assert total["warp instructions"] <= instructions(case.name) * LOOSE
    assert total["matrix wavefronts"] == total["matrix least"]  # every ldmatrix meets eight slots
    assert total["shared wavefronts"] <= bank_conflicts(case.name) * total["shared least"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kernel", "blocks"), [("dequant_add_kernel", 1), (r"spmm_rows_kernelI\w+Li[12]E", 2)])
def test_loads_leave_before_anything_waits(kernel: str, blocks: int, arch: str, modules: dict[str, Module]) -> None:
    """Codes, 8-bit absmax and its scale, of all rows that a warp reads, are asked for before one of them is used."""
    found = [one for name, one in modules[arch].items() if re.search(kernel, name)]
    assert found
    for one in found:
        absmax = one.where(r"^ld\.global\.nc\.u8")
        assert absmax and len(absmax) % blocks == 0
        for group in (absmax[i : i + blocks] for i in range(0, len(absmax), blocks)):
            begin = max(i for i in one.where(r"^ld\.global\.nc\.v4") if i < group[0])
            end = min(i for i in one.where(r"^ld\.global\.nc\.f32") if i > group[-1])
            asked: set[str] = set()
            for instruction in one.instructions[begin : end + 1]:
                target, *sources = instruction.operands or ("",)
                assert not asked & set(re.findall(r"%\w+", " ".join(sources))), instruction
                if instruction.opcode.startswith("ld.global.nc"):
                    asked |= set(re.findall(r"%\w+", target))
            assert len(asked) >= blocks * (4 + 1 + 1)
