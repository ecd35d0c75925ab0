"""What users write for amounts and places, read in one place: ``0.3%``, ``20M``, ``24GB``, ``activations,base``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from qrosa.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_MOST = 2**60  # no count or size is larger
_SIZE_UNITS = {"b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40}


@dataclass(frozen=True)
class Offload:
    """What is kept on the host: asked for (True), ruled out (False), or left to the plan (None).

    Attributes:
        activations: Boundary activations of checkpointing.
        base: Packed layers of the base.
        disk: Folder that the base is mapped from, None for host memory.
        optimizer: Masters and optimizer states, by DeepSpeed; never left to the plan.
        nvme: Folder that they are kept in, None for host memory.
    """

    activations: bool | None
    base: bool | None
    disk: str | None = None
    optimizer: bool = False
    nvme: str | None = None


def _shown(text: object) -> str:
    """What was written, quoted, and cut where it is long."""
    return repr(text) if len(str(text)) <= 60 else f"{str(text)[:60]!r}..."


def parse_budget(text: str) -> tuple[str, float]:
    """Read a budget: ``("share", 0.003)`` for ``0.3%``, ``("count", 20e6)`` for ``20M``.

    Raises:
        InputError: Not a share above 0% and up to 100%, nor a positive count.
    """
    hint = "write a share of the base's parameters (0.3%) or a count (20M)"
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|[kmgb]?)\s*", str(text), re.IGNORECASE)
    if match is None:
        raise InputError(f"budget {_shown(text)} is neither a share nor a count", hint)
    value, unit = float(match[1]), match[2].lower()
    if value > _MOST:
        raise InputError(f"budget {_shown(text)} is more than any model has", hint)
    if unit == "%":
        if not 0 < value <= 100:
            raise InputError(f"budget {text} is not above 0% and up to 100%", hint)
        return "share", value / 100
    count = value * _UNITS[unit]
    if count < 1 or count != math.floor(count):
        raise InputError(f"budget {_shown(text)} is not a whole number of parameters", hint)
    return "count", count


def parse_share(text: str | float, flag: str) -> float:
    """Read ``5%`` or ``0.05`` as 0.05.

    Raises:
        InputError: Not a number, or not between 0 and 100%.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%?)\s*", str(text), re.IGNORECASE)
    if match is None:
        raise InputError(f"{flag} {_shown(text)} is not a share", "write a share such as 5% or 0.05")
    value = float(match[1]) / (100 if match[2] else 1)
    if not 0 <= value <= 1:
        raise InputError(f"{flag} {text} is not between 0 and 100%", "write a share such as 5% or 0.05")
    return value


def parse_size(text: str | int, flag: str) -> int:
    """Read ``24GB`` or ``24GiB`` (2^30 bytes each: card makers mean that), ``800MB`` or a plain byte count, in bytes.

    Raises:
        InputError: Not a size, or not above zero.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?b?)\s*", str(text), re.IGNORECASE)
    hint = "write a size such as 24GB or 800MB"
    if match is None:
        raise InputError(f"{flag} {_shown(text)} is not a size", hint)
    unit = match[2].lower().replace("i", "")
    scale = _SIZE_UNITS[unit if unit.endswith("b") else unit + "b"]
    size = float(match[1]) * scale
    if size > _MOST:
        raise InputError(f"{flag} {_shown(text)} is more than any machine has", hint)
    if size < 1:
        raise InputError(f"{flag} {_shown(text)} is not above zero", hint)
    return int(size)


def parse_offload(text: str) -> Offload:
    """Read ``auto``, ``none``, or parts such as ``activations,base``, ``base=disk:/scratch`` or ``auto,optimizer``.

    Raises:
        InputError: An unknown part.
    """
    if text == "none":
        return Offload(False, False)
    parts = [part.strip() for part in text.split(",")]
    if "none" in parts:
        raise InputError(
            f"--offload {text}: none stands alone", "leave none out: what is not named stays on the device"
        )
    folders: dict[str, str] = {}
    for part in parts:
        name, _, folder = part.partition(":")
        if name in ("base=disk", "optimizer=nvme") and folder:
            folders[name] = folder
        elif part not in ("auto", "activations", "base", "optimizer"):
            raise InputError(
                f"--offload {part!r} is unknown",
                "use auto, none, activations, base, base=disk:FOLDER, optimizer or optimizer=nvme:FOLDER",
            )
    disk, nvme = folders.get("base=disk"), folders.get("optimizer=nvme")
    others = None if "auto" in parts else False
    return Offload(
        activations="activations" in parts or others,
        base=disk is not None or "base" in parts or others,
        disk=disk,
        optimizer=nvme is not None or "optimizer" in parts,
        nvme=nvme,
    )


def optimizer_parts(text: str) -> list[str]:
    """What a text for ``parse_offload`` says of the optimizer, as it stands there; no plan moves that by itself."""
    return [part.strip() for part in text.split(",") if part.strip().startswith("optimizer")]


def bytes_text(size: float) -> str:
    """Bytes for people, in binary units: ``23.40 GiB``, ``512.0 MiB``; what ``24GB`` on the command line means too."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
