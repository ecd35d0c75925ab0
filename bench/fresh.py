"""What a stranger meets: a new clone, a new virtual environment, an empty home and cache, then the demo's every step.

    make fresh                       # the commit that is checked out, about ten minutes
    python bench/fresh.py --full     # the whole demo instead of its quick form

A warm cache hides faults: what a library prints on its first import, a folder that is not there yet, a download that is
taken for granted. Only where pip finds packages is taken over from this machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What ``make`` and pip need of the environment; HOME, caches, virtual environments and Python paths stay behind.
_KEPT = ("PATH", "LANG", "LC_ALL", "TERM", "TMPDIR", "PYTHON", "CUDA_HOME")
_KEPT_PREFIXES = ("PIP_", "SSL_", "HTTP", "HTTPS", "NO_PROXY", "http", "https", "no_proxy")


def environment(home: Path) -> dict[str, str]:
    """This machine's way to packages, and a home in which nothing has ever run."""
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    settings = Path.home() / ".config" / "pip" / "pip.conf"
    if settings.is_file():
        kept.setdefault("PIP_CONFIG_FILE", str(settings))
    return kept | {"HOME": str(home), "PIP_CACHE_DIR": str(home / "pip")}


def main() -> None:
    """Clone, set up and run in a temporary folder; leaves with the exit code of the first step that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="run the whole demo")
    full = parser.parse_args().full
    with tempfile.TemporaryDirectory(prefix="qrosa-fresh-") as scratch:
        home, clone = Path(scratch, "home"), Path(scratch, "qrosa")
        home.mkdir()
        demo = ["make", "demo"] if full else [".venv/bin/python", "bench/demo.py", "--quick"]
        for command, folder in (
            (["git", "clone", "--quiet", str(ROOT), str(clone)], ROOT),
            (["make", "build"], clone),
            (demo, clone),
        ):
            print("$", *command, flush=True)
            done = subprocess.run(command, cwd=folder, env=environment(home), check=False)
            if done.returncode:
                raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
