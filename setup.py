"""Builds the compiled libraries: ``_C_cpu`` always, ``_C_cuda`` wherever nvcc is found (a card is not needed).

Both use only PyTorch's stable ABI and no Python API, so that one wheel (abi3) serves every supported PyTorch and
Python. A CUDA library that cannot be built is one line of warning: the CPU library stands without it.

Environment: ``QROSA_CUDA_ARCHS`` ("80;86;90", exactly these) instead of what nvcc knows of ``CUDA_ARCHS``;
``QROSA_WITH_CUDA=1`` makes a CUDA library that fails an error, ``QROSA_WITHOUT_CUDA=1`` leaves it out; ``CUDA_HOME``
names the toolkit; ``QROSA_SANITIZE=1`` is an AddressSanitizer and UBSan build of the CPU library.
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

CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
"""Cards that kernels are compiled for. A cubin also serves newer cards of its generation (86 runs on 8.7, 120 on 12.1);
for the newest two the library holds PTX besides, which a driver compiles for whatever comes after them."""

PTXAS_REPORTS = ROOT / "build" / "ptxas"
"""What the CUDA assembler says about each kernel: registers, shared memory, spills. A test reads it."""
STATISTIC = re.compile(r"ptxas info\s*:|\s*\d+ bytes stack frame")


class BuildFailed(Exception):
    """A tool failed. ``output`` is all that it said."""

    def __init__(self, tool: str, work: str, output: str) -> None:
        self.output = output
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        told = (line for line in lines if re.search(r"error|fatal|cannot|unsupported|no such", line, re.I))
        reason = next(told, "")
        super().__init__(f"{tool} failed on {work}" + (f": {reason[:200]}" if reason else ""))


def run(command: list[str], work: str) -> str:
    """What a tool prints; BuildFailed where it fails or is not there."""
    tool = Path(command[0]).name
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildFailed(tool, work, str(error)) from error
    if result.returncode != 0:
        raise BuildFailed(tool, work, result.stdout)
    return result.stdout


def switched(name: str) -> bool:
    """Whether a switch of the environment is on."""
    return os.environ.get(name) == "1"


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, else where nvcc lies (which may be a wrapper elsewhere), else the usual place."""
    if switched("QROSA_WITHOUT_CUDA"):
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    homes = (Path(candidate) for candidate in candidates if candidate)
    return next((h for h in homes if (h / "bin/nvcc").exists() and (h / "include/cuda_runtime.h").exists()), None)


def cuda_archs(nvcc: str) -> list[str]:
    """The cards to compile for: those asked for, else those of CUDA_ARCHS that this nvcc knows."""
    asked = os.environ.get("QROSA_CUDA_ARCHS", "").replace(",", ";")
    if asked:
        return [arch for arch in asked.split(";") if arch]
    known = run([nvcc, "--list-gpu-code"], "--list-gpu-code").split()
    archs = [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]
    if not archs:
        raise BuildFailed("nvcc", "--list-gpu-code", f"error: it knows none of sm_{', sm_'.join(CUDA_ARCHS)}")
    return archs


def cuda_targets(archs: list[str]) -> list[str]:
    """What the library will hold: machine code (sm_) for each card, PTX (compute_) for the newest two."""
    newest = sorted(archs, key=int)[-2:]
    return [f"sm_{arch}" for arch in archs] + [f"compute_{arch}" for arch in newest]


def target_flags(targets: list[str]) -> list[str]:
    """nvcc's options for ``targets``."""
    numbers = [(target, target.split("_")[1]) for target in targets]
    return [flag for target, arch in numbers for flag in ("-gencode", f"arch=compute_{arch},code={target}")]


def sources(folder: str, *patterns: str) -> list[str]:
    """The source files of one library, relative to the root."""
    return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted((ROOT / "csrc" / folder).glob(pattern))]


def headers(folder: str) -> list[str]:
    """The headers that a library is made of: its own, and those that both share."""
    return sources(folder, "*.h", "*.cuh") + sources(".", "*.h")


def extensions() -> list[Extension]:
    """What can be built here."""
    cpu = [s for s in sources("cpu", "*.cpp") if X86 or Path(s).name not in ISA_FLAGS]
    found = [Extension("qrosa._C_cpu", cpu, depends=headers("cpu"), py_limited_api=True)]
    if cuda_home() is not None:
        cuda = sources("cuda", "*.cpp", "*.cu")
        found.append(Extension("qrosa._C_cuda", cuda, depends=headers("cuda"), py_limited_api=True))
    elif switched("QROSA_WITH_CUDA"):
        raise SystemExit("error: QROSA_WITH_CUDA=1, and no CUDA toolkit: put nvcc on the PATH or set CUDA_HOME")
    return found


class BuildLibraries(build_ext):
    """Compiles file by file, each with the flags of its kind, and only what changed: a file, or the command."""

    def build_extensions(self) -> None:
        """Builds every library. One for cards that fails is left out with a warning, unless it was asked for."""
        for ext in list(self.extensions):
            try:
                self.build_extension(ext)
            except BuildFailed as failure:
                if not ext.name.endswith("_cuda") or switched("QROSA_WITH_CUDA"):
                    raise SystemExit(f"{failure.output}\nerror: {failure}") from failure
                for folder in (Path(self.build_lib), ROOT):  # an older one would not fit the package
                    (folder / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
                self.extensions.remove(ext)
                print(
                    f"warning: no CUDA library, cards run plain PyTorch: {failure} (QROSA_WITHOUT_CUDA=1 does not try)"
                )

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links one library."""
        target = Path(self.get_ext_fullpath(ext.name))
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        targets: list[str] = []
        if ext.name.endswith("_cuda"):
            targets = cuda_targets(cuda_archs(str(cuda_home() / "bin" / "nvcc")))
        with ThreadPoolExecutor(self.parallel or os.cpu_count() or 1) as pool:
            objects = list(pool.map(lambda source: self._compile(source, folder, ext.depends, targets), ext.sources))
        target.parent.mkdir(parents=True, exist_ok=True)
        self._link(objects, target, folder, targets)

    def _compile(self, source: str, folder: Path, depends: list[str], targets: list[str]) -> Path:
        name, output = Path(source).name, folder / (Path(source).name + ".o")
        include = [f"-I{ROOT / 'csrc'}", "-isystem", str(TORCH / "include")]
        if targets:
            include += [f"-I{cuda_home()}/include", "-DUSE_CUDA"]
        if name.endswith(".cu"):
            command = [str(cuda_home() / "bin" / "nvcc"), "-O3", "-std=c++17", "-lineinfo", "-Xptxas", "-v"]
            command += ["-Xcompiler", "-fPIC", "--threads", "2", *target_flags(targets)]
        else:
            command = [os.environ.get("CXX", "c++"), *CXX_FLAGS, *ISA_FLAGS.get(name, [])]
            command += [f'-DQROSA_CUDA_TARGETS="{" ".join(targets)}"'] if targets else []
        command += [*DEFINES, *include, "-c", str(ROOT / source), "-o", str(output)]
        report = PTXAS_REPORTS / f"{name}.log"
        made = [output, report] if name.endswith(".cu") else [output]
        said = self._make(made, [ROOT / path for path in (source, *depends)], command, source)
        if said is not None and name.endswith(".cu"):
            PTXAS_REPORTS.mkdir(parents=True, exist_ok=True)
            report.write_text(said, encoding="utf-8")
        return output

    def _link(self, objects: list[Path], target: Path, folder: Path, targets: list[str]) -> None:
        # libtorch.so is in every wheel and depends on libtorch_cuda.so where there is one, so a library built against a
        # CPU-only PyTorch finds its symbols in a CUDA one. It is loaded already: no rpath is needed.
        libraries = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        linker = [os.environ.get("CXX", "c++"), "-shared"]
        if targets:  # named, because nvcc would add an empty cubin for its default card
            linker = [str(cuda_home() / "bin" / "nvcc"), "-shared", "-cudart", "static", *target_flags(targets)]
            libraries = [f"-L{TORCH / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
        elif SANITIZE:
            linker.append("-fsanitize=address,undefined")
        partial = folder / target.name
        self._make([partial], objects, [*linker, *map(str, objects), *libraries, "-o", str(partial)], target.name)
        if not target.exists() or target.stat().st_mtime < partial.stat().st_mtime:
            installed = target.with_suffix(".partial")
            shutil.copy(partial, installed)
            os.replace(installed, target)  # a process that has the old library loaded keeps it

    def _make(self, made: list[Path], inputs: list[Path], command: list[str], work: str) -> str | None:
        """Runs ``command`` unless all of ``made`` is newer than ``inputs`` and was made by this very command.

        Prints what the tool says but the assembler's statistics, and returns all of it; None where nothing was to do.
        """
        record, recipe = made[0].with_suffix(".command"), f"torch {torch.__version__}\n{chr(10).join(command)}\n"
        newest = max(path.stat().st_mtime for path in inputs)
        fresh = record.exists() and record.read_text(encoding="utf-8") == recipe
        if not self.force and fresh and all(path.exists() and path.stat().st_mtime > newest for path in made):
            return None
        record.unlink(missing_ok=True)
        self.announce(" ".join(command), level=2)
        said = run(command, work)
        record.write_text(recipe, encoding="utf-8")
        print("".join(line for line in said.splitlines(True) if not STATISTIC.match(line)), end="", flush=True)
        return said


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildLibraries},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
