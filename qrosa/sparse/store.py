"""Adapters on disk: one safetensors file, one JSON file, and nothing that can run code.

The JSON file is the manifest: it holds size and SHA-256 of the tensors' file and of itself, so a byte that a disk or a
copy changed is noticed, and says of each module what its tensors must add up to. The base's ``source`` is left out of
its digest: a base may move, its fingerprint stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError, StorageError
from qrosa.files import (
    document_digest,
    file_digest,
    read_json,
    read_tensors,
    write_fault,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT = "qrosa-adapter"
BESIDE = ".."  # how an adapter in its base's own folder names the base: the two are moved together
VERSION = 2
_SEAL = "sha256"  # of the config without this key and without the base's source
_FOR_PEFT = "a qrosa adapter; for PEFT run: qrosa export RUN --output FOLDER --format peft"  # PEFT says it in its error
_COPY_AGAIN = "copy the adapter folder again"
_INDICES = (".sparse_row_ptr", ".sparse_col")


def write_adapter(folder: str | Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Save an adapter into ``folder``: tensors first, the config that makes it complete last.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_fault(folder, error) from None
    write_tensors(folder / ADAPTER_FILE, tensors)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "peft_type": _FOR_PEFT,
        **config,
        "files": {ADAPTER_FILE: file_digest(folder / ADAPTER_FILE)},
    }
    write_json(folder / CONFIG_FILE, {**document, _SEAL: _seal(document)})


def _seal(document: Mapping[str, Any]) -> str:
    base = {key: value for key, value in document["base"].items() if key != "source"}
    return document_digest({**{key: value for key, value in document.items() if key != _SEAL}, "base": base})


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Read an adapter's config alone; a base that the folder lies in is named by its path of today.

    Raises:
        InputError: There is no adapter in ``folder``, or it was made by something else or by a newer version.
        StorageError: The file is damaged.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} holds no adapter ({CONFIG_FILE} is missing)", "give a run folder or its adapter/ folder"
        )
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise InputError(f"{path} is not a qrosa adapter", "adapters of other tools cannot be read; give a qrosa run")
    if type(config.get("version")) is not int or config["version"] > VERSION:
        raise InputError(f"{path} has version {config.get('version')!r}, newer than this qrosa", "update qrosa")
    if config["version"] != VERSION:
        raise InputError(f"{path} has version {config['version']}, older than {VERSION}", "train it again")
    if not all(isinstance(config.get(key), dict) for key in ("base", "adapter", "modules", "files")):
        raise StorageError(f"{path} is incomplete", _COPY_AGAIN)
    if config.get(_SEAL) != _seal(config):
        raise StorageError(f"{path} is not what was written", _COPY_AGAIN)
    for module, entry in config["modules"].items():
        _check_module(path, module, entry)
    if config["base"].get("source") == BESIDE:
        config["base"]["source"] = str(path.resolve().parent.parent)
    return config


def _check_module(path: Path, module: str, entry: Any) -> None:
    """Refuse a module whose rank, scale, values or shape are missing or impossible."""
    try:
        counts, alpha = (entry["rank"], entry["nnz"], *entry["shape"]), entry["alpha"]
        sound = all(type(count) is int and count >= 0 for count in counts) and len(entry["shape"]) == 2
        sound = sound and type(alpha) in (int, float) and math.isfinite(alpha) and (alpha > 0 or entry["rank"] == 0)
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise StorageError(f"{path} does not say rank, alpha, nnz and shape of {module[:80]!r}", _COPY_AGAIN)


def read_adapter(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter's tensors and config, and check that they are one another's.

    Raises:
        InputError: There is no readable adapter in ``folder``, or it has values that are not finite.
        StorageError: A file is damaged, or tensors are missing.
    """
    config = read_adapter_config(folder)
    path = Path(folder) / ADAPTER_FILE
    tensors = read_tensors(path)
    if file_digest(path) != config["files"].get(ADAPTER_FILE):
        raise StorageError(f"{path} is not what was written", _COPY_AGAIN)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() == name.endswith(_INDICES):
            raise StorageError(f"{path}: {name[:80]!r} has dtype {tensor.dtype}", _COPY_AGAIN)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{path}: {name[:80]!r} holds values that are not finite", "train the adapter again")
    _check_complete(path, tensors, config["modules"])
    return tensors, config


def _check_complete(path: Path, tensors: Mapping[str, Tensor], modules: Mapping[str, Any]) -> None:
    """Refuse tensors that are not those that the config names."""
    parts: dict[str, set[str]] = {module: set() for module in modules}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if module not in parts:
            raise StorageError(f"{path} holds {name[:80]!r}, of a module that its config does not name", _COPY_AGAIN)
        parts[module].add(part)
    for module, entry in modules.items():
        sparse = {part for part in parts[module] if part.startswith("sparse_")}
        low_rank = parts[module] - sparse
        values = tensors.get(f"{module}.sparse_values")
        rows = tensors.get(f"{module}.low_rank_A")
        agrees = bool(low_rank) == (entry["rank"] > 0) and bool(sparse) == (entry["nnz"] > 0)
        agrees = agrees and (values is None or values.numel() == entry["nnz"])
        agrees = agrees and (rows is None or (rows.ndim == 2 and rows.shape[0] == entry["rank"]))
        if not agrees:
            raise StorageError(f"{path} does not hold the tensors of {module[:80]!r}", _COPY_AGAIN)
