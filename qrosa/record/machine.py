"""What a run was made on and with: processor or card, and the versions of what computed it."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch

from qrosa.quantities import bytes_text

_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "deepspeed")
_ROOT = Path(__file__).parents[2]


def describe_machine(device: torch.device, processes: int = 1) -> dict[str, str]:
    """What -> which, in words, for a report: the device, the system, and versions, as far as they are installed.

    Args:
        device: What the run computes on.
        processes: That share the run.
    """
    if device.type == "cuda":
        memory = bytes_text(torch.cuda.get_device_properties(device).total_memory)
        found = {"card": f"{torch.cuda.get_device_name(device)}, {memory}", "CUDA": str(torch.version.cuda)}
    else:
        found = {"processor": f"{processor_name()}, {torch.get_num_threads()} threads"}
    if processes > 1:
        found["processes"] = str(processes)
    found |= {"system": f"{platform.system()} {platform.release()}", "Python": platform.python_version()}
    commit = package_commit()
    found["qrosa"] = f"{_version('qrosa') or 'not installed'}{f', commit {commit[:12]}' if commit else ''}"
    return found | {name: known for name in _PACKAGES if (known := _version(name))}


def processor_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def package_commit() -> str | None:
    """The commit of the clone that the package runs in, or that pip took it from; None where none is known."""
    if (_ROOT / ".git").exists():
        asked = ["git", "-C", str(_ROOT), "rev-parse", "HEAD"]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.SubprocessError):  # no git here
            return None
        return done.stdout.strip() or None
    try:
        source = json.loads(distribution("qrosa").read_text("direct_url.json") or "{}")
        return str(source["vcs_info"]["commit_id"])
    except (PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
