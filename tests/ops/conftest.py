"""Each op test runs once for every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from op_inputs import ISAS

from qrosa import ops


def best_isa() -> str:
    return ops.force_cpu_isa(ISAS[-1])


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one code path of the CPU kernels for the test."""
    if ops.status()["cpu"]["library"] is None:
        pytest.skip("the CPU library is not built")
    used = ops.force_cpu_isa(request.param)
    try:
        if used != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield used
    finally:
        best_isa()
