"""The CUDA kernels as nvcc emits them, run thread by thread without a card.

Stronger than the emulator of ``tests/ops/emulator``, which compiles the source for the CPU: here the inline assembly,
its constraints and what the compiler reorders are run too, and a race is found by what synchronises it and not by a
wrong value. What ptxas makes of PTX, and whether a card does what its manual says, only a card can show.
"""

from __future__ import annotations

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
