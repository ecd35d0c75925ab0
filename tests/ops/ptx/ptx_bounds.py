"""Upper bounds of the work of each case of ``ptx_cases``, so that a slower kernel is a decision and not an accident.

Warp instructions as nvcc 13.0 emits them, counted by ``ptx_machine``; another nvcc may need LOOSE times as many. Passes
of shared memory against those without bank conflicts (matrix loads must have none at all).
"""

from __future__ import annotations

LOOSE = 1.05

_INSTRUCTIONS = {
    "damaged": 99533,
    "dequant_add bf16": 13022,
    "dequant_add bf16 unaligned": 1257,
    "dropout bf16": 3465,
    "dropout bf16 unaligned": 1020,
    "spmm_rows bf16 1": 28836,
    "spmm_rows bf16 2": 15360,
    "spmm_rows bf16 4": 38091,
    "spmm_any bf16": 8772,
    "score bf16": 17745,
    "score bf16 unaligned": 8318,
    "tiles bf16": 23815,
    "tiles bf16 unaligned": 28934,
    "dequant_add fp16": 13022,
    "dequant_add fp16 unaligned": 1257,
    "dropout fp16": 3321,
    "dropout fp16 unaligned": 988,
    "spmm_rows fp16 1": 28718,
    "spmm_rows fp16 2": 15684,
    "spmm_rows fp16 4": 39381,
    "spmm_any fp16": 8508,
    "score fp16": 17745,
    "score fp16 unaligned": 8318,
    "tiles fp16": 23815,
    "tiles fp16 unaligned": 28934,
    "dequant_add fp32": 13847,
    "dequant_add fp32 unaligned": 1239,
    "dropout fp32": 3688,
    "dropout fp32 unaligned": 976,
    "spmm_rows fp32 1": 25999,
    "spmm_rows fp32 2": 13658,
    "spmm_rows fp32 4": 32122,
    "spmm_any fp32": 8397,
    "score fp32": 103294,
    "score fp32 unaligned": 31588,
    "tiles fp32": 79105,
    "tiles fp32 unaligned": 74120,
    "spmm_tensor bf16 1": 12104,
    "spmm_tensor bf16 2": 75242,
    "gather bf16": 79198,
    "gather bf16 unaligned": 18311,
    "spmm_tensor fp16 1": 12092,
    "spmm_tensor fp16 2": 75952,
    "gather fp16": 79198,
    "gather fp16 unaligned": 18311,
    "norm bf16": 13842,
    "norm bf16 wide": 18132,
    "norm bf16 unaligned": 2046,
    "norm bf16 wide unaligned": 12156,
    "gate bf16": 9306,
    "gate bf16 joined": 3327,
    "gate bf16 unaligned": 1296,
    "norm fp16": 9954,
    "norm fp16 wide": 13812,
    "norm fp16 unaligned": 1872,
    "norm fp16 wide unaligned": 11112,
    "gate fp16": 7962,
    "gate fp16 joined": 3039,
    "gate fp16 unaligned": 1235,
    "norm fp32": 19854,
    "norm fp32 wide": 11232,
    "norm fp32 unaligned": 1120,
    "norm fp32 wide unaligned": 9578,
    "gate fp32": 8756,
    "gate fp32 joined": 3030,
    "gate fp32 unaligned": 1198,
}

_CONFLICTS = {
    "spmm_rows": 1.0,
    "spmm_tensor": 1.45,  # the partial sums of a warp, once a block
    "dequant_add": 1.05,
    "score": 1.0,
    "tiles": 1.08,
    "gather": 1.03,
    "norm": 1.0,
}
"""Of aligned inputs, by kernel."""

UNALIGNED = 4.0
"""Inputs that are not aligned are staged a value at a time."""


def instructions(case: str) -> int:
    """Warp instructions of a case."""
    return _INSTRUCTIONS[case]


def bank_conflicts(case: str) -> float:
    """Passes of shared memory over those that are needed."""
    return UNALIGNED if case.endswith("unaligned") else _CONFLICTS.get(case.split()[0], 1.1)
