"""Pack all that a card is measured with into one folder, for a machine that has a card and torch and no registry.

    make gpu-kit                              # here: build/gpu-kit, under 60 MB
    python3 run.py                            # there, in that folder: everything, part by part
    python3 run.py --part ops                 # one part; each takes less than ten minutes (--list names them)

The folder holds the sources with both compiled libraries, and the packages that such a machine may lack or have too
old, of bitsandbytes only the library for one version of CUDA. Results lie in ``results`` beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "build" / "gpu-kit"
MOST = 60 * 10**6  # bytes that are carried
PACKAGES = ("transformers", "huggingface_hub", "tokenizers", "safetensors", "bitsandbytes", "accelerate", "peft")
SOURCES = ("qrosa", "bench", "tests", "configs", "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
LIBRARIES = ("_C_cpu", "_C_cuda")
_LEFT_OUT = ("__pycache__", "tests/ops/emulator", "bench/results")
_RUN = ROOT / "bench" / "gpu_kit_run.py"


def main() -> None:
    """Pack the folder and say how large it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=KIT)
    parser.add_argument("--cuda", default="130", help="version of bitsandbytes' library, as torch's CUDA")
    chosen = parser.parse_args()
    size = pack(chosen.output, chosen.cuda)
    print(f"{chosen.output}: {size / 1e6:.1f} MB")


def pack(folder: Path, cuda: str) -> int:
    """Write the kit; its bytes.

    Raises:
        SystemExit: A library is not built, or the kit is too large to carry.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "source.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in source_files():
            archive.write(path, path.relative_to(ROOT))
    with zipfile.ZipFile(folder / "packages.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, name in package_files(cuda):
            archive.write(path, name)
    shutil.copy(_RUN, folder / "run.py")
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    if size > MOST:
        raise SystemExit(f"the kit has {size / 1e6:.1f} MB, more than {MOST / 1e6:.0f}")
    return size


def source_files() -> Iterator[Path]:
    """The tracked files of the project that run there, and its compiled libraries."""
    listed = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if not any(part in name for part in _LEFT_OUT) and (ROOT / name).is_file():
            yield ROOT / name
    for stem in LIBRARIES:
        built = sorted((ROOT / "qrosa").glob(f"{stem}*.so"))
        if not built:
            raise SystemExit(f"qrosa/{stem}*.so is not built: run 'make build' where nvcc is on the PATH")
        yield built[0]


def package_files(cuda: str) -> Iterator[tuple[Path, Path]]:
    """Files of the packages and of their metadata, with their names from the folder that packages lie in."""
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise SystemExit(f"{package} is not installed here, so it cannot be packed")
        root = Path(found.origin).parent
        for place in (root, *root.parent.glob(f"{package.replace('-', '_')}-*.dist-info")):
            for path in sorted(place.rglob("*")):
                if path.is_file() and _wanted(path, package, cuda):
                    yield path, path.relative_to(root.parent)


def _wanted(path: Path, package: str, cuda: str) -> bool:
    if "__pycache__" in path.parts or path.suffix == ".pyc":
        return False
    if package == "bitsandbytes" and path.name.startswith("libbitsandbytes_"):
        return path.stem in ("libbitsandbytes_cpu", f"libbitsandbytes_cuda{cuda}")
    return True


if __name__ == "__main__":
    sys.exit(main())
