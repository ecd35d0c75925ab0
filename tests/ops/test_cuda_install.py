"""``setup.py`` with toolkits that are old, broken or changed: scripts stand in for nvcc and for the C++ compiler.

A CUDA library that cannot be built must not cost anybody the CPU library, and one that is asked for must not be missed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVERY_CARD = "75 80 86 87 88 89 90 100 103 110 120 121"  # CUDA 13.0

# A compiler that writes its -o and its command line, and refuses what FAILS names.
COMPILER = """#!/bin/sh
echo "$0 $*" >> "$LOG"
case " $* " in *" --list-gpu-code "*)
  [ -n "$CODES" ] || { echo "nvcc fatal   : Unknown option '--list-gpu-code'"; exit 1; }
  for code in $CODES; do echo "sm_$code"; done
  exit 0;;
esac
if [ -n "$FAILS" ]; then
  case "$0 $*" in *nvcc*$FAILS*) echo "note: on the way"; echo "nvcc fatal   : refused $FAILS"; exit 1;; esac
fi
while [ $# -gt 0 ]; do [ "$1" = -o ] && output=$2; shift; done
echo made > "$output"
"""


class Tree:
    """A copy of what ``setup.py`` needs, with stand-ins for its tools."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "qrosa").mkdir()
        (folder / "qrosa" / "__init__.py").touch()
        (folder / "setup.py").write_text((ROOT / "setup.py").read_text())
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        toolkit = folder / "toolkit"
        (toolkit / "include").mkdir(parents=True)
        (toolkit / "include" / "cuda_runtime.h").touch()
        (toolkit / "bin").mkdir()
        for tool in (toolkit / "bin" / "nvcc", folder / "c++"):
            tool.write_text(COMPILER)
            tool.chmod(0o755)

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs ``setup.py build_ext --inplace``; ``log`` holds the tools' command lines of this run only."""
        self.log.write_text("")
        known = {"CODES": EVERY_CARD, "FAILS": "", "LOG": str(self.log), "CXX": str(self.folder / "c++")}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("QROSA_")}
        environment = {**inherited, "CUDA_HOME": str(self.folder / "toolkit"), **known, **environment}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def library(self, device: str) -> Path | None:
        return next(iter((self.folder / "qrosa").glob(f"_C_{device}*.so")), None)

    def compiled(self, tool: str) -> list[str]:
        """The commands of this run that compile a file with ``tool``."""
        return [line for line in self.log.read_text().splitlines() if f"/{tool} " in line and " -c " in line]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def only_the_cpu_library(tree: Tree, done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert done.returncode == 0, done.stderr
    assert tree.library("cpu") is not None and tree.library("cuda") is None
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: no CUDA library")
    assert reason in lines[0] and "QROSA_WITHOUT_CUDA=1" in lines[0]


def test_machine_code_for_every_card_and_ptx_for_the_newest_two(tree: Tree) -> None:
    done = tree.build()
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr
    assert tree.library("cpu") is not None and tree.library("cuda") is not None
    for command in tree.compiled("nvcc"):
        for arch in (80, 86, 89, 90, 100, 120):
            assert f"arch=compute_{arch},code=sm_{arch}" in command
        assert [arch for arch in EVERY_CARD.split() if f"code=compute_{arch}" in command] == ["100", "120"]
    said = [command for command in tree.compiled("c++") if "QROSA_CUDA_TARGETS" in command]
    assert said and all('"sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_100 compute_120"' in line for line in said)


def test_an_older_nvcc_builds_for_the_cards_that_it_knows(tree: Tree) -> None:
    assert tree.build(CODES="70 75 80 86 87 89 90").returncode == 0  # CUDA 12.0
    command = tree.compiled("nvcc")[0]
    assert "sm_90" in command and "code=compute_89" in command and "code=compute_90" in command
    assert "sm_100" not in command and "sm_120" not in command


def test_an_nvcc_that_knows_no_card_of_ours(tree: Tree) -> None:
    only_the_cpu_library(tree, tree.build(CODES="35 50 60 70 75"), "knows none of sm_80")


def test_an_nvcc_too_old_to_be_asked(tree: Tree) -> None:
    only_the_cpu_library(tree, tree.build(CODES=""), "Unknown option '--list-gpu-code'")


@pytest.mark.parametrize("fails", ["sddmm.cu", "-shared"])  # with this host compiler; without libcudart_static.a
def test_an_nvcc_that_fails(tree: Tree, fails: str) -> None:
    assert tree.build().returncode == 0
    touched = tree.folder / "csrc" / "cuda" / "warp.cuh"
    os.utime(touched, (2**31 - 10, 2**31 - 10))
    only_the_cpu_library(tree, tree.build(FAILS=fails), f"refused {fails}")  # the older library is gone, too


def test_an_nvcc_that_does_not_start(tree: Tree) -> None:
    (tree.folder / "toolkit" / "bin" / "nvcc").write_text("#!/no/such/interpreter\n")
    only_the_cpu_library(tree, tree.build(), "No such file")


def test_a_library_that_was_asked_for_is_an_error(tree: Tree) -> None:
    done = tree.build(FAILS="sddmm.cu", QROSA_WITH_CUDA="1")
    assert done.returncode != 0
    assert "error: nvcc failed on csrc/cuda/sddmm.cu" in done.stderr and "note: on the way" in done.stderr
    (tree.folder / "toolkit" / "include" / "cuda_runtime.h").unlink()
    if not Path("/usr/local/cuda/include/cuda_runtime.h").exists():
        done = tree.build(QROSA_WITH_CUDA="1", PATH="/usr/bin:/bin")
        assert done.returncode != 0 and "no CUDA toolkit" in done.stderr


def test_a_cpu_library_that_fails_is_an_error(tree: Tree) -> None:
    (tree.folder / "c++").write_text("#!/bin/sh\necho 'fatal error: no'\nexit 1\n")
    done = tree.build(QROSA_WITHOUT_CUDA="1")
    assert done.returncode != 0 and "failed on csrc/cpu/" in done.stderr


def test_cards_asked_for_are_taken_as_they_are(tree: Tree) -> None:
    only_the_cpu_library(tree, tree.build(QROSA_CUDA_ARCHS="80;999", FAILS="sm_999"), "refused sm_999")
    assert tree.build(QROSA_CUDA_ARCHS="86,120").returncode == 0
    assert "sm_86" in tree.compiled("nvcc")[0] and "sm_80" not in tree.compiled("nvcc")[0]


def test_only_what_changed_is_compiled_again(tree: Tree) -> None:
    assert tree.build(QROSA_CUDA_ARCHS="80").returncode == 0
    sources = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert len(tree.compiled("nvcc")) == sources
    assert tree.build(QROSA_CUDA_ARCHS="80").returncode == 0
    assert not tree.compiled("nvcc") and not tree.compiled("c++")
    assert tree.build(QROSA_CUDA_ARCHS="80;90").returncode == 0  # other cards: the CUDA library, and it alone
    assert len(tree.compiled("nvcc")) == sources
    assert all("csrc/cuda/" in command for command in tree.compiled("c++"))
    header = tree.folder / "csrc" / "cpu" / "kernels.h"
    os.utime(header, (2**31 - 10, 2**31 - 10))
    assert tree.build(QROSA_CUDA_ARCHS="80;90").returncode == 0
    assert not tree.compiled("nvcc") and tree.compiled("c++")
