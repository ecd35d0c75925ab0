"""Run a kit (``make gpu-kit``) on the machine with the card: the tests with a tiny model first, then every figure.

Needs Python, torch with CUDA, and pytest; everything else is in the kit. Each part is a process of its own. What was
measured lies in ``results``, also of a part that failed; the exit code is 1 where one did.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = {
    "first-card": ("tests/card",),
    "op-tests": ("tests", "--ignore", "tests/card"),
}
MOST = 595  # seconds of a part, which cuts itself before; a machine is often lent for ten minutes a command


def main(arguments: list[str] | None = None) -> int:
    """Unpack, then run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", help="one part only")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    chosen = parser.parse_args(arguments)
    work = unpack(HERE / "unpacked")
    parts = [*TESTS, *_output(work, "-m", "bench.gpu", "--list").split()]
    if chosen.list:
        print("\n".join(parts))
        return 0
    if chosen.part and chosen.part not in parts:
        parser.error(f"no part is named {chosen.part}: --list names them")
    failed = [part for part in ([chosen.part] if chosen.part else parts) if _run(work, part)]
    print(f"failed: {', '.join(failed)}" if failed else "all parts ran through")
    return 1 if failed else 0


def unpack(folder: Path) -> Path:
    """The kit's files, once."""
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("source", "packages"):
            with zipfile.ZipFile(HERE / f"{name}.zip") as archive:
                archive.extractall(folder / name)
        (folder / "whole").touch()
    return folder


def _run(work: Path, part: str) -> int:
    """The exit code of a part; what it has measured is kept, whatever it ends with."""
    command = ["-m", "bench.gpu", "--part", part]
    if part in TESTS:
        command = ["-m", "pytest", "-m", "gpu", "-rs", "-q", "-p", "no:cacheprovider", *TESTS[part]]
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=work / "source", env=_environment(work), check=False, timeout=MOST
        )
        code = done.returncode
    except subprocess.TimeoutExpired:
        print(f"{part} took more than {MOST} s and was ended", flush=True)
        code = 1
    measured = work / "source" / "bench" / "results"
    if measured.exists():
        shutil.copytree(measured, HERE / "results", dirs_exist_ok=True)
    return code


def _output(work: Path, *command: str) -> str:
    source, environment = work / "source", _environment(work)
    done = subprocess.run(
        [sys.executable, *command], cwd=source, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def _environment(work: Path) -> dict[str, str]:
    """The kit's packages before those that are installed; nothing is looked for on a hub."""
    path = os.pathsep.join([str(work / "source"), str(work / "packages"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    sys.exit(main())
