"""The CUDA kernels on the CPU: their index maps walked exhaustively, and the kernels run on a model of a block.

``emulator/warp_model.h`` turns each thread into a fiber, with barriers, exchange within a warp, ldmatrix, tensor-core
products and asynchronous copies as the PTX ISA defines them; the kernels are compiled as they stand. Sanitizers watch
every access. What only a card can show is speed, and that the hardware does what its manual says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATOR = Path(__file__).resolve().parent / "emulator"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def compiled(source: str, folder: Path, *flags: str) -> Path:
    """Compiles one program of the emulator."""
    program = folder / source.removesuffix(".cpp")
    command = [str(COMPILER), "-std=c++20", "-O1", "-Wall", "-Wextra", "-ffp-contract=off", *flags]
    command += [f"-I{EMULATOR}", str(EMULATOR / source), "-o", str(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return program


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # CUDA's unroll pragmas mean nothing to g++; the -Wclobbered it gives for getcontext is a false alarm.
    quiet = (
        "-Wno-unknown-pragmas",
        "-Wno-clobbered",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    )
    return compiled("kernels.cpp", tmp_path_factory.mktemp("emulator"), *quiet)


def test_index_maps(tmp_path: Path) -> None:
    result = subprocess.run([compiled("index_maps.cpp", tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["dequant_add", "sddmm_gather", "tiles", "dequant_spmm", "dropout", "damaged"])
def test_kernels_on_a_model_of_a_block(kernels: Path, name: str) -> None:
    """Over odd shapes, forwards and backwards through the threads; ``damaged`` feeds indices that point anywhere."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}  # fibers bring their own stacks
    result = subprocess.run([kernels, name], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("right") == 2
