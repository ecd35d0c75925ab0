"""PTX of csrc/cuda as nvcc emits it for the cards that people have; compiled once a session."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ptx_program import Kernel, kernels

CSRC = Path(__file__).resolve().parents[3] / "csrc"
NVCC = shutil.which("nvcc")

Module = dict[str, Kernel]
"""Every kernel by its mangled name."""


def compiled(source: Path, arch: str, folder: Path) -> str:
    """The PTX of one source file, with the optimisation of the library's build."""
    output = folder / f"{source.stem}.{arch}.ptx"
    command = [str(NVCC), "-ptx", "-O3", "-std=c++17", f"-arch=compute_{arch}", f"-I{CSRC}", str(source)]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return re.sub(r"^\.target .*$", "", output.read_text(encoding="utf-8"), flags=re.M)


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Module]:
    """The kernels for each card; the same object for cards that nvcc emits the same PTX for."""
    if NVCC is None:
        pytest.skip("nvcc is not on the PATH")
    folder, sources = tmp_path_factory.mktemp("ptx"), sorted((CSRC / "cuda").glob("*.cu"))
    archs = ("86", "89", "90")
    jobs = [(source, arch) for arch in archs for source in sources]
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda job: compiled(*job, folder), jobs))
    made: dict[tuple[str, ...], Module] = {}
    found: dict[str, Module] = {}
    for i, arch in enumerate(archs):
        parts = tuple(texts[i * len(sources) : (i + 1) * len(sources)])
        if parts not in made:
            made[parts] = {name: kernel for text in parts for name, kernel in kernels(text).items()}
        found[arch] = made[parts]
    return found
