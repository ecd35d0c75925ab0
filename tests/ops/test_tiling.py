"""The CUDA kernels on the CPU: their index maps walked exhaustively, and the kernels run on a model of a block.

``emulator/warp_model.h`` turns each thread into a fiber, with barriers, exchange within a warp, ldmatrix, tensor-core
products and asynchronous copies as the PTX ISA defines them; ``emulator/cuda_runtime.h`` stands in for the runtime, so
kernels and launchers are compiled as they stand. Sanitizers watch every access. What only a card can show is speed, and
that the hardware does what its manual says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATOR = Path(__file__).resolve().parent / "emulator"
LAUNCHERS = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""For programs that run kernels and launchers; the environment tells ASan that fibers bring their own stacks."""


# CUDA's unroll pragmas mean nothing to g++; the -Wclobbered it gives for getcontext is a false alarm.
FLAGS = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered", "-ffp-contract=off")


def compiled(output: Path, *inputs: str | Path) -> Path:
    """Compiles a program, or an object where ``inputs`` say -c."""
    command = [str(COMPILER), *FLAGS, "-DQROSA_EMULATOR=1", f"-I{EMULATOR}", *map(str, inputs), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return output


def run(program: Path, *arguments: str) -> str:
    """What the program prints; it must succeed."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Kernels and launchers of csrc/cuda, compiled for the CPU."""
    folder = tmp_path_factory.mktemp("launchers")
    sources = sorted(LAUNCHERS.glob("*.cu"))
    return [compiled(folder / f"{path.stem}.o", *SANITIZED, "-c", "-x", "c++", path) for path in sources]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory, launchers: list[Path]) -> Path:
    program = tmp_path_factory.mktemp("kernels") / "kernels"
    return compiled(program, *SANITIZED, EMULATOR / "kernels.cpp", *launchers)


def test_index_maps(tmp_path: Path) -> None:
    assert run(compiled(tmp_path / "index_maps", EMULATOR / "index_maps.cpp")) == "right\n"


def test_launchers(tmp_path: Path, launchers: list[Path]) -> None:
    """Grids at any size, errors, the limit of shared memory and the plan of a call, against a model of the runtime."""
    assert run(compiled(tmp_path / "launchers", *SANITIZED, EMULATOR / "launchers.cpp", *launchers)) == "right\n"


@pytest.mark.parametrize(
    "name", ["dequant_add", "sddmm_gather", "tiles", "dequant_spmm", "folded", "dropout", "norms", "gates", "damaged"]
)
def test_kernels_on_a_model_of_a_block(kernels: Path, name: str) -> None:
    """Over odd shapes, forwards and backwards through the threads; ``damaged`` feeds indices that point anywhere."""
    assert run(kernels, name).count("right") == 2
