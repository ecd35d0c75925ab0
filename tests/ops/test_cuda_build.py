"""The compiled CUDA library and the assembler's report on it, checked without a card.

``setup.py`` keeps what ptxas says about every kernel in ``build/ptxas``; compiling for all targets takes minutes, so
the tests read that report and never compile.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qrosa.ops.cuda_build import CudaBuild

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = next(iter(sorted((ROOT / "qrosa").glob("_C_cuda*.so"))), None)
BUILD = CudaBuild.read(LIBRARY) if LIBRARY is not None else None
TARGETS = tuple(f"{major}{minor}" for major, minor in BUILD.cubins) if BUILD is not None else ()

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the CUDA library is not built here (no nvcc)")

KERNELS = {  # of each source file, with the number of types and sizes it is made for
    "dequant_add.cu": {"dequant_add_kernel": 3},
    "dropout.cu": {"dropout_kernel": 3},
    "gate.cu": {"gate_kernel": 3, "gate_backward_kernel": 3},
    "rms_norm.cu": {"rms_norm_kernel": 6, "rms_norm_backward_kernel": 6},
    "sddmm.cu": {
        "gather_index_kernel": 1,
        "gather_kernel": 2,
        "gather_sum_kernel": 1,
        "sddmm_tile_kernel": 2,
        "sddmm_wide_kernel": 1,
    },
    "score_accumulate.cu": {"score_kernel": 2, "score_wide_kernel": 1},
    "dequant_spmm.cu": {"spmm_any_kernel": 3, "spmm_rows_kernel": 9, "spmm_tensor_kernel": 4},
}


@dataclass(frozen=True)
class Compiled:
    """What ptxas says about one kernel for one target."""

    name: str
    target: str
    stack: int
    spills: int
    registers: int


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<target>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


def report(source: str) -> str:
    path = ROOT / "build" / "ptxas" / f"{source}.log"
    assert path.exists(), f"{path} is missing: run `make build`"
    assert path.stat().st_mtime >= (ROOT / "csrc" / "cuda" / source).stat().st_mtime, "run `make build`: it is older"
    return path.read_text(encoding="utf-8")


def compiled(source: str) -> list[Compiled]:
    return [
        Compiled(m["name"], m["target"], int(m["stack"]), int(m["stores"]) + int(m["loads"]), int(m["registers"]))
        for m in _ENTRY.finditer(report(source))
    ]


def test_the_library_says_what_it_is_built_for() -> None:
    assert BUILD is not None and BUILD.runtime // 1000 >= 11 and BUILD.cubins
    assert BUILD.ptx == tuple(sorted(BUILD.cubins)[-2:])  # for whatever comes after the newest two


def test_every_source_is_listed() -> None:
    assert {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")} == set(KERNELS)


@pytest.mark.parametrize("source", sorted(KERNELS))
def test_every_kernel_for_every_target(source: str) -> None:
    found = compiled(source)
    for kernel, variants in KERNELS[source].items():
        for target in TARGETS:
            names = {c.name for c in found if c.target == target and re.search(rf"\d{kernel}(I|E)", c.name)}
            assert len(names) == variants, (kernel, target, names)
    assert len(found) == sum(KERNELS[source].values()) * len(TARGETS)


@pytest.mark.parametrize("source", sorted(KERNELS))
def test_no_spills_no_stack_and_no_warnings(source: str) -> None:
    assert not [c for c in compiled(source) if c.spills or c.stack]
    assert "warning" not in report(source).lower()


def test_the_library_needs_only_the_stable_abi() -> None:
    """So one library serves every PyTorch: no C++ symbol of it, and no CUDA runtime beside the one linked in."""
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("needs binutils")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
    foreign = [line.split()[-1] for line in symbols.splitlines() if " w " not in line and not system.search(line)]
    assert not [name for name in foreign if not name.startswith(("aoti_torch_", "torch_"))]
    needed = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "libtorch.so" in needed
    assert not re.search(r"libcudart|libc10|libcuda\.so", needed)


def test_the_library_loads_and_registers_every_op(tmp_path: Path) -> None:
    """A CPU-only PyTorch lacks one symbol, the current stream; with a stand-in for it the library loads anywhere.

    The way to a sparse gradient is read from the environment once, at loading, and changed by an op afterwards.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None or torch.version.cuda:
        pytest.skip("needs a C++ compiler and a PyTorch without CUDA")
    stub = tmp_path / "stream.so"
    code = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", stub], input=code, text=True, check=True)
    check = (
        "import sys, torch, qrosa.ops\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "ops = ['dequant_add', 'sddmm', 'dequant_spmm', 'score_accumulate', 'dropout']\n"
        "ops += ['rms_norm', 'rms_norm_backward', 'gate', 'gate_backward']\n"
        "print([op for op in ops if not has(f'qrosa::{op}', 'CUDA')])\n"
        "print([torch.ops.qrosa.sddmm_way(request) for request in (-1, 1, -1, 0)])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", check, str(LIBRARY)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(stub), "QROSA_SDDMM": "tiles"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[]", "[2, 1, 1, 0]"]
