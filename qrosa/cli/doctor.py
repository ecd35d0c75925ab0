"""``qrosa doctor``: what this machine can do, and what to change where it could do more.

Each check looks at one thing and says ``ok``, ``note`` (works, but could be better, or is optional), ``problem`` (part
of qrosa will not work, or slowly) or ``broken`` (nothing will). Checks try the thing where that is quick: bitsandbytes
quantises a matrix, and every op runs on the CPU and on each card. Nothing is sent over the network.
"""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from qrosa.cli.options import emit_json, json_option, result_console
from qrosa.errors import first_line, install_hint
from qrosa.quantities import bytes_text

OLDEST_TORCH = (2, 10)
_LOW_DISK = 10 * 2**30  # bytes; a 7B checkpoint in 16 bits is 14 GB, its export as much again
_STYLES = {"ok": "green", "note": "cyan", "problem": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Check:
    """One finding: a name, a state of ``_STYLES``, what was found, and what to do unless it is ok."""

    name: str
    state: str
    found: str
    hint: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@click.command()
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check this machine: torch, card, op libraries, disk, with a hint for each problem.

    The exit code is 0 unless something is broken that everything else needs.
    """
    checks = examine()
    broken = any(check.state == "broken" for check in checks)
    if as_json:
        emit_json({"ok": not broken, "checks": checks})
    else:
        _print_table(checks)
    if broken:
        ctx.exit(1)


def examine() -> list[Check]:
    """Run every check; one that fails itself is a finding, too."""
    checks: list[Check] = []
    for name, look in _CHECKS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a warning would say is a finding here, with its hint
                checks.append(look())
        except Exception as error:
            hint = "install it again: 'make distclean build' in the clone that it came from, or the wheel once more"
            checks.append(Check(name, "broken", f"{type(error).__name__}: {first_line(error)}", hint))
    return checks


def check_torch() -> Check:
    """The version of torch, and whether it can drive a card."""
    import torch

    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    found = f"{torch.__version__} on Python {facts['python']}, {facts['threads']} threads"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(str(part) for part in OLDEST_TORCH)
        return Check("torch", "broken", found, f"install torch {oldest} or newer", facts)
    return Check("torch", "ok", found, facts=facts)


def check_card() -> Check:
    """The CUDA cards that torch sees, with their memory."""
    import torch

    from qrosa.cli.card_facts import card_facts

    if torch.cuda.is_available():
        cards = [card_facts(index) for index in range(torch.cuda.device_count())]
        found = "; ".join(
            f"{card['name']}, {bytes_text(card['free'])} of {bytes_text(card['total'])} free, sm_{card['capability']}"
            for card in cards
        )
        unused = [f"torch fails on cuda:{card['index']}: {card['fails']}" for card in cards if card["fails"]]
        if unused:
            hint = "install a torch for this card and its driver; or hide the card with CUDA_VISIBLE_DEVICES"
            return Check("card", "broken", f"{found}; {'; '.join(unused)}", hint, {"cards": cards})
        return Check("card", "ok", found, facts={"cards": cards})
    if not (Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi")):
        return Check("card", "note", "none", "everything runs on the CPU; models above about 1B will be slow")
    if torch.version.cuda is None:
        return Check("card", "problem", "there is one, but torch was built without CUDA", "install torch's CUDA build")
    return Check(
        "card",
        "problem",
        f"there is a driver, but torch's CUDA {torch.version.cuda} finds no card",
        "compare with nvidia-smi: the driver may be too old, or CUDA_VISIBLE_DEVICES may hide the card",
    )


def check_ops() -> Check:
    """Which op library serves which device, and whether each op gives there what plain torch gives."""
    import torch

    from qrosa import ops
    from qrosa.cli.op_check import wrong_ops
    from qrosa.ops.library import fixes

    status = ops.status()
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    served = {device: entry for device, entry in status.items() if device == "cpu" or cards}
    parts = []
    for device, entry in served.items():
        by = f"{Path(entry['library']).name} ({entry.get('isa') or 'compiled'})" if entry["library"] else "plain torch"
        parts.append(f"{device}: {by}")
    wrong = [fault for device in ("cpu", *cards) for fault in wrong_ops(device)]
    if wrong:
        hint = "build it again for what is here: make clean build"
        if cards:
            hint += "; or hide the card with CUDA_VISIBLE_DEVICES, and everything runs on the CPU"
        return Check("ops", "broken", "; ".join(wrong), hint, status)
    slow = [device for device, entry in served.items() if not entry["library"]]
    if slow:
        note = served[slow[0]].get("note") or "no compiled library"
        return Check("ops", "problem", f"{', '.join(parts)} ({note})", fixes[slow[0]], status)
    return Check("ops", "ok", ", ".join(parts), facts=status)


def check_cpu() -> Check:
    """The vector instructions and memory of the host."""
    import psutil

    flags = _cpu_flags()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "asimd")
    isa = [name for name in known if name in flags]
    memory = psutil.virtual_memory()
    facts = {"isa": isa, "cores": os.cpu_count(), "memory": memory.total, "memory_available": memory.available}
    found = (
        f"{facts['cores']} cores, {' '.join(isa) or 'no vector extensions'}, "
        f"{bytes_text(memory.available)} of {bytes_text(memory.total)} free"
    )
    if "avx2" not in isa and platform.machine() in ("x86_64", "AMD64"):
        return Check("cpu", "note", found, "without AVX2 the ops run their portable loops, which are slower", facts)
    return Check("cpu", "ok", found, facts=facts)


def check_libraries() -> Check:
    """The libraries that every run needs."""
    names = ("transformers", "accelerate", "bitsandbytes", "safetensors")
    versions = {name: _version(name) for name in names}
    missing = [name for name, found in versions.items() if found is None]
    text = ", ".join(f"{name} {found or 'missing'}" for name, found in versions.items())
    if missing:
        return Check("libraries", "broken", text, f"pip install {' '.join(missing)}", {"versions": versions})
    return Check("libraries", "ok", text, facts={"versions": versions})


def check_bitsandbytes() -> Check:
    """Whether bitsandbytes' 4-bit quantisation works here, tried on a small matrix."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 128 * 64, device=device).reshape(128, 64)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    error = (dequantize_4bit(packed, state) - weight).abs().max().item()
    if error > 0.25:
        return Check("bitsandbytes", "broken", f"NF4 is wrong by {error:.2f} on {device}", "install another version")
    return Check("bitsandbytes", "ok", f"{_version('bitsandbytes')} quantises on {device}", facts={"device": device})


def check_extras() -> Check:
    """Optional packages, by what they add."""
    extras = ("data", "gguf", "tensorboard", "wandb", "trackio")
    purposes = {
        "datasets": "dataset ids",
        "pyarrow": ".parquet files",
        "gguf": ".gguf bases",
        "tensorboard": "--log-to tensorboard",
        "wandb": "--log-to wandb",
        "trackio": "--log-to trackio",
    }
    versions = {name: _version(name) for name in purposes}
    missing = [name for name, found in versions.items() if found is None]
    found = ", ".join(f"{name} {text}" for name, text in versions.items() if text) or "none"
    if missing:
        lacking = ", ".join(f"{name} ({purposes[name]})" for name in missing)
        return Check("extras", "note", found, f"not installed: {lacking}; {install_hint(*extras)}", versions)
    return Check("extras", "ok", found, facts=versions)


def check_deepspeed() -> Check:
    """DeepSpeed, and the tools that it compiles its access to drives with."""
    found = _version("deepspeed")
    tools = {tool: shutil.which(tool) for tool in ("g++", "ninja")}
    facts = {"version": found, "tools": tools}
    if found is None:
        hint = f"only runs over several cards or machines need it: {install_hint('deepspeed')}"
        return Check("deepspeed", "note", "not installed", hint, facts)
    absent = [tool for tool, path in tools.items() if path is None]
    if absent:
        hint = f"only NVMe offload needs {' and '.join(absent)}: its access to drives is compiled on first use"
        return Check("deepspeed", "note", f"{found}, without {', '.join(absent)}", hint, facts)
    return Check("deepspeed", "ok", found, facts=facts)


def check_disk() -> Check:
    """Room where runs are written (here) and where models are cached."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"here": Path.cwd(), "model cache": _existing(Path(HF_HUB_CACHE))}
    free = {name: shutil.disk_usage(place).free for name, place in places.items()}
    facts = {name: {"path": str(places[name]), "free": free[name]} for name in places}
    found = ", ".join(f"{bytes_text(free[name])} free {name} ({places[name]})" for name in places)
    locked = [str(place) for place in places.values() if not os.access(place, os.W_OK)]
    if locked:
        return Check("disk", "problem", f"{locked[0]} cannot be written to", "change its permissions or move", facts)
    if min(free.values()) < _LOW_DISK:
        return Check("disk", "note", found, "a 7B export takes about 14 GB; free some room before one", facts)
    return Check("disk", "ok", found, facts=facts)


def check_hub() -> Check:
    """Whether models and data sets may come from the hub. Only settings are read; nothing is contacted."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    facts = {"offline": bool(HF_HUB_OFFLINE), "cache": HF_HUB_CACHE}
    if HF_HUB_OFFLINE:
        hint = "only local folders and cached models load; unset HF_HUB_OFFLINE to download"
        return Check("hub", "note", "offline, by HF_HUB_OFFLINE", hint, facts)
    return Check("hub", "ok", f"downloads allowed, kept in {HF_HUB_CACHE}", facts=facts)


_CHECKS: dict[str, Callable[[], Check]] = {
    "torch": check_torch,
    "card": check_card,
    "cpu": check_cpu,
    "libraries": check_libraries,
    "bitsandbytes": check_bitsandbytes,
    "ops": check_ops,
    "extras": check_extras,
    "deepspeed": check_deepspeed,
    "disk": check_disk,
    "hub": check_hub,
}


def _print_table(checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for check in checks:
        table.add_row(check.name, Text(check.state, style=_STYLES[check.state]), Text(check.found))
        if check.hint:
            table.add_row("", "", Text(f"-> {check.hint}", style="dim"))
    result_console().print(table)


def _cpu_flags() -> set[str]:
    """Feature flags of the first core, empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if place.exists())
