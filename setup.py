"""Builds the compiled libraries: ``_C_cpu`` always, ``_C_cuda`` wherever nvcc is found (a card is not needed).

Both use only PyTorch's stable ABI and no Python API, so that one wheel (abi3) serves every supported PyTorch and
Python. Environment: ``QROSA_CUDA_ARCHS`` (default 80;86;89;90;120), ``QROSA_SANITIZE=1`` for an AddressSanitizer and
UBSan build of the CPU library, ``QROSA_WITHOUT_CUDA=1`` to leave the CUDA library out, ``CUDA_HOME`` for the toolkit.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).resolve().parent
OLDEST_TORCH = "0x020a000000000000"  # 2.10: the stable ABI that the libraries are held to
SANITIZE = os.environ.get("QROSA_SANITIZE") == "1"

X86 = platform.machine().lower() in ("x86_64", "amd64")
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": _AVX512,
    "kernels_avx512bf16.cpp": [*_AVX512, "-mavx512bf16"],
    "kernels_amx.cpp": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
"""One file an instruction set; run-time dispatch (csrc/cpu/isa.cpp) keeps a machine off what it lacks."""

# Contraction would fuse the product and the sum of a nested absmax, and with that leave bitsandbytes' values.
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# GCC takes the undefined operands inside AVX-512 intrinsics for ours.
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
CXX_FLAGS += (
    ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    if SANITIZE
    else ["-O3"]
)
DEFINES = [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]

PTXAS_REPORTS = ROOT / "build" / "ptxas"
"""What the CUDA assembler says about each kernel: registers, shared memory, spills. A test reads it."""
STATISTIC = re.compile(r"ptxas info\s*:|\s*\d+ bytes stack frame")


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, else where nvcc lies (which may be a wrapper elsewhere), else the usual place."""
    if os.environ.get("QROSA_WITHOUT_CUDA") == "1":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    homes = (Path(candidate) for candidate in candidates if candidate)
    return next((h for h in homes if (h / "bin/nvcc").exists() and (h / "include/cuda_runtime.h").exists()), None)


def cuda_flags() -> list[str]:
    """nvcc's options for each target in QROSA_CUDA_ARCHS."""
    archs = [a for a in os.environ.get("QROSA_CUDA_ARCHS", "80;86;89;90;120").replace(",", ";").split(";") if a]
    targets = [flag for arch in archs for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    return ["-O3", "-std=c++17", "-lineinfo", "-Xptxas", "-v", "-Xcompiler", "-fPIC", "--threads", "2", *targets]


def sources(folder: str, *patterns: str) -> list[str]:
    """The source files of one library, relative to the root."""
    return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted((ROOT / "csrc" / folder).glob(pattern))]


def extensions() -> list[Extension]:
    """What can be built here."""
    cpu = [s for s in sources("cpu", "*.cpp") if X86 or Path(s).name not in ISA_FLAGS]
    patterns = ("*.h", "*.cuh")
    headers = sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").rglob(pattern))
    found = [Extension("qrosa._C_cpu", cpu, depends=headers, py_limited_api=True)]
    cuda = sources("cuda", "*.cpp", "*.cu")
    if cuda_home() is not None and any(s.endswith(".cu") for s in cuda):
        found.append(Extension("qrosa._C_cuda", cuda, depends=headers, py_limited_api=True))
    return found


class BuildLibraries(build_ext):
    """Compiles file by file, each with the flags of its kind."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links one library, unless it is newer than all that it is made of."""
        target = Path(self.get_ext_fullpath(ext.name))
        inputs = [ROOT / p for p in [*ext.sources, *ext.depends, "setup.py"]]
        if not self.force and target.exists() and target.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
            return
        is_cuda = ext.name.endswith("_cuda")
        objects_folder = Path(self.build_temp).resolve() / ext.name
        objects_folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.parallel or os.cpu_count() or 1) as pool:
            objects = list(pool.map(lambda source: self._compile(source, objects_folder, is_cuda), ext.sources))
        target.parent.mkdir(parents=True, exist_ok=True)
        self._link(objects, target, is_cuda)

    def _compile(self, source: str, folder: Path, is_cuda: bool) -> str:
        name, output = Path(source).name, str(folder / (Path(source).name + ".o"))
        include = [f"-I{ROOT / 'csrc'}", "-isystem", str(TORCH / "include")]
        if is_cuda:
            include += [f"-I{cuda_home()}/include", "-DUSE_CUDA"]
        if name.endswith(".cu"):
            command = [str(cuda_home() / "bin" / "nvcc"), *cuda_flags()]
        else:
            command = [os.environ.get("CXX", "c++"), *CXX_FLAGS, *ISA_FLAGS.get(name, [])]
        report = self._run([*command, *DEFINES, *include, "-c", str(ROOT / source), "-o", output])
        if name.endswith(".cu"):
            PTXAS_REPORTS.mkdir(parents=True, exist_ok=True)
            (PTXAS_REPORTS / f"{name}.log").write_text(report, encoding="utf-8")
        return output

    def _link(self, objects: list[str], target: Path, is_cuda: bool) -> None:
        # libtorch.so is in every wheel and depends on libtorch_cuda.so where there is one, so a library built against a
        # CPU-only PyTorch finds its symbols in a CUDA one. It is loaded already: no rpath is needed.
        libraries = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        linker = [os.environ.get("CXX", "c++"), "-shared"]
        if is_cuda:
            linker = [str(cuda_home() / "bin" / "nvcc"), "-shared", "-cudart", "static"]
            libraries = [f"-L{TORCH / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
        elif SANITIZE:
            linker.append("-fsanitize=address,undefined")
        partial = target.with_suffix(".partial")
        self._run([*linker, *objects, *libraries, "-o", str(partial)])
        os.replace(partial, target)  # a process that has the old library loaded keeps it

    def _run(self, command: list[str]) -> str:
        """Runs a tool, prints what it says but the assembler's statistics, and returns all of it."""
        self.announce(" ".join(command), level=2)
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print("".join(line for line in result.stdout.splitlines(True) if not STATISTIC.match(line)), end="", flush=True)
        if result.returncode != 0:
            raise SystemExit(f"error: {Path(command[0]).name} failed on {command[-3]}")
        return result.stdout


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
