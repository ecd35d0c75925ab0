"""Drivers and cards that the CUDA library does not serve get plain PyTorch and one line that says why.

The driver is a stand-in for ``libcuda.so.1`` that reports a version and a card; nothing here needs a real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qrosa.ops.cuda_build import Card, CudaBuild, Machine

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
BUILD = CudaBuild(13000, ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)), ((10, 0), (12, 0)))

DRIVER = """
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { *version = DRIVER; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = attribute == 75 ? MAJOR : MINOR; return 0; }
}
"""


@pytest.mark.parametrize(
    "card",
    [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)],  # A100 to GB10
)
def test_machine_code_serves_its_generation(card: Card) -> None:
    assert BUILD.refusal(13000, [card]) is None


def test_a_newer_driver_compiles_for_cards_between_and_after() -> None:
    for card in ((11, 0), (13, 0)):  # Thor, and whatever comes
        assert BUILD.refusal(13000, [card]) is None
    older = CudaBuild(12080, ((8, 0), (9, 0)), ((9, 0),))
    assert older.refusal(13000, [(12, 0)]) is None
    assert older.refusal(12080, [(12, 0)]) is None


@pytest.mark.parametrize("card", [(7, 0), (7, 5)])  # V100, T4
def test_cards_before_ampere_are_told_so(card: Card) -> None:
    refusal = BUILD.refusal(13000, [(8, 6), card])
    assert refusal is not None
    assert "sm_80 or newer" in refusal.reason and f"sm_{card[0]}{card[1]}" in refusal.reason


def test_a_library_for_other_cards_names_the_rebuild() -> None:
    refusal = CudaBuild(13000, ((8, 9),), ()).refusal(13000, [(8, 6)])
    assert refusal is not None
    assert "built for sm_89" in refusal.reason and "QROSA_CUDA_ARCHS=86" in refusal.fix


def test_a_driver_of_an_older_major_version_is_told_so() -> None:
    for driver in (12040, 12090):
        refusal = BUILD.refusal(driver, [(8, 9)])
        assert refusal is not None
        assert f"CUDA 12.{driver % 1000 // 10}" in refusal.reason and "CUDA 13.0" in refusal.reason
        assert "update the driver" in refusal.fix
    assert CudaBuild(12080, ((8, 9),), ()).refusal(12020, [(8, 9)]) is None  # same major version: compatible


def test_an_older_driver_of_the_same_major_version_compiles_no_ptx() -> None:
    build = CudaBuild(13010, ((8, 0),), ((8, 0),))
    assert build.refusal(13000, [(9, 0)]) is not None
    assert build.refusal(13010, [(9, 0)]) is None


def test_no_driver_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert Machine.here() is None


def test_a_file_that_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "library.so").write_bytes(b"\x7fELF nothing of the kind")
    assert CudaBuild.read(tmp_path / "library.so") is None


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that says it was built with CUDA 13.0 for Ampere to Blackwell; it must never be loaded."""
    path = tmp_path_factory.mktemp("library") / "_C_cuda.abi3.so"
    path.write_bytes(b"not a library: qrosa-cuda-build runtime=13000 targets=sm_80 sm_89 sm_120 compute_120;")
    return path


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("driver", "card", "reason", "fix"),
    [
        (12080, (8, 9), "the driver is for CUDA 12.8, the library is built with CUDA 13.0", "update the driver"),
        (13000, (7, 5), "the kernels need a card of sm_80 or newer, this one is sm_75", "use a newer card"),
        (13000, (9, 0), "built for sm_80, sm_89, sm_120, this card is sm_90", "QROSA_CUDA_ARCHS=90"),
    ],
)
def test_the_composition_serves_with_one_line(
    driver: int, card: Card, reason: str, fix: str, library: Path, tmp_path: Path
) -> None:
    values = [f"-DDRIVER={driver}", f"-DMAJOR={card[0]}", f"-DMINOR={card[1]}"]
    stub = tmp_path / "libcuda.so.1"
    command = [str(COMPILER), "-shared", "-fPIC", *values, "-x", "c++", "-", "-o", str(stub)]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    code = f"""
import pathlib, sys, warnings, torch
torch.cuda.is_available, torch.version.cuda = lambda: True, "13.0"
glob = pathlib.Path.glob
found = [pathlib.Path({str(library)!r})]
pathlib.Path.glob = lambda self, pattern: found if "_C_cuda" in pattern else glob(self, pattern)
from qrosa import ops
from qrosa.ops import library
print(ops.status()["cuda"]["library"], ops.status()["cuda"]["note"])
for _ in range(2):
    library._warn_once("cuda", "linear")
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(all(has(f"qrosa::{{op}}", "CUDA") for op in library._KERNELS))
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    command = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout.startswith("None") and reason in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1] == "True"
    assert done.stderr.count("no compiled library for cuda") == 1
    assert reason in done.stderr and fix in done.stderr
