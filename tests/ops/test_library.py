"""Which code serves a device: forced instruction sets, and the stand-in without a library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_inputs import delta, matrix, quantized

from qrosa import ops

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return result.stdout + result.stderr


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_the_environment_forces_an_instruction_set(isa: str) -> None:
    if ops.status()["cpu"]["library"] is None or ops.force_cpu_isa(isa) != isa:
        pytest.skip(f"this machine has no {isa} path")
    ops.force_cpu_isa("amx")
    code = "from qrosa import ops; print('isa', ops.status()['cpu']['isa'])"
    assert f"isa {isa}" in run(code, QROSA_CPU_ISA=isa)


def test_without_a_library_the_composition_runs_and_warns_once() -> None:
    code = """
import pathlib, torch
glob = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: [] if pattern.startswith('_C_') else glob(self, pattern)
from qrosa import ops
assert ops.status()['cpu'] == {'library': None, 'note': 'not built', 'isa': 'portable'}, ops.status()
nf4 = ops.NF4Operands(torch.zeros(64, dtype=torch.uint8), torch.ones(2), None, None, None, 64)
for _ in range(2):
    y = ops.linear(torch.ones(9, 64, dtype=torch.bfloat16), nf4, 2)
    assert torch.equal(y, torch.full((9, 2), -64, dtype=torch.bfloat16))
    ops.dequant_spmm(torch.ones(1, 64), nf4, None, 2)
"""
    output = run(code)
    assert output.count("no compiled library for cpu") == 1
    assert "pip install" in output


def test_an_older_library_lacks_ops_and_says_so(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    empty = tmp_path / "_C_cpu.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", empty], input="", text=True, check=True)
    code = f"""
import pathlib, torch
glob = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: [pathlib.Path({str(empty)!r})] if '_C_cpu' in pattern else glob(self, pattern)
from qrosa.ops import library
from qrosa.ops.rms_norm import rms_norm
assert library.libraries['cpu'].name == '_C_cpu.so'
for _ in range(2):
    assert torch.equal(rms_norm(torch.ones(2, 8), torch.ones(8), 0.0), torch.ones(2, 8))
"""
    output = run(code)
    assert output.count("no compiled library for cpu (it is older than the package, without rms_norm)") == 1


def test_the_composition_serves_every_op_alike() -> None:
    """The plain PyTorch stand-ins and the kernels are called through the same schemas."""
    from qrosa.ops.library import _COMPOSITIONS

    nf4, _, _ = quantized(6, 64, nested=True)
    csr = delta(6, 64, 0.2)
    x, dy = matrix(3, 64, torch.float32), matrix(3, 6, torch.float32)
    out = torch.empty(6, 64)
    _COMPOSITIONS["dequant_add"](*nf4, *csr, out)
    kernel = torch.empty(6, 64)
    ops.dequant_add(nf4, csr, kernel)
    assert torch.equal(out, kernel)
    torch.testing.assert_close(_COMPOSITIONS["sddmm"](dy, x, *csr[:2]), ops.sddmm(dy, x, *csr[:2]))
    torch.testing.assert_close(_COMPOSITIONS["dequant_spmm"](x, *nf4, *csr, 6), ops.dequant_spmm(x, nf4, csr, 6))
    first, second = torch.ones(2, 6, 64)
    _COMPOSITIONS["score_accumulate"](dy, x, first, True)
    ops.score_accumulate(dy, x, second, True)
    torch.testing.assert_close(first, second)


def test_status_names_a_library_or_a_reason() -> None:
    for device, entry in ops.status().items():
        assert device in ("cpu", "cuda")
        assert bool(entry["library"]) != bool(entry["note"])
    assert ops.status()["cpu"]["isa"] in ("portable", "avx2", "avx512")


@pytest.mark.skipif(not ops.status()["cpu"]["library"], reason="no compiled library")
def test_the_library_loads_under_an_older_glibc() -> None:
    """2.28, as PyTorch's own wheels do: each symbol's version stands in the file by name."""
    library = Path(ops.status()["cpu"]["library"]).read_bytes()
    asked = {int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library)}
    assert asked and max(asked) <= 28
