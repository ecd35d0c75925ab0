"""Adapters on disk: one safetensors file, one JSON file, and nothing that can run code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError, StorageError
from qrosa.files import read_json, read_tensors, write_fault, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT = "qrosa-adapter"
VERSION = 1


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
    write_json(folder / CONFIG_FILE, {"format": FORMAT, "version": VERSION, **config})


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Read an adapter's config alone.

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
    if not isinstance(config.get("version"), int) or config["version"] > VERSION:
        raise InputError(f"{path} has version {config.get('version')}, newer than this qrosa", "update qrosa")
    if not all(isinstance(config.get(key), dict) for key in ("base", "adapter", "modules")):
        raise StorageError(f"{path} is incomplete", "copy the adapter folder again")
    return config


def read_adapter(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter's tensors and config.

    Raises:
        InputError: There is no readable adapter in ``folder``.
        StorageError: A file is damaged.
    """
    config = read_adapter_config(folder)
    return read_tensors(Path(folder) / ADAPTER_FILE), config
