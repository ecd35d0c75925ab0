"""Digests of tensors by all of their bytes, taken once a file and kept in the user's cache.

Hashing 16 GB takes seconds, 140 GB a minute or more, and every command that loads an adapter wants them. So they are
kept under the file's path with its size, time of change and inode: where one of these differs, all are taken anew.
A cache that cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from qrosa.base.weight_files import StoredTensor
from qrosa.errors import QrosaError
from qrosa.files import cache_folder, read_json, write_json

_PIECE = 2**22  # bytes read at a time
_THREADS = 8  # hashing lets go of the interpreter; more than this wait for the disk


def tensor_digests(tensors: Iterable[StoredTensor]) -> dict[StoredTensor, str]:
    """SHA-256, in hex, of each tensor's bytes.

    Raises:
        OSError: A file cannot be read.
    """
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.path, []).append(tensor)
    found: dict[StoredTensor, str] = {}
    for path, wanted in by_file.items():
        found |= _of_file(path, wanted)
    return found


def _of_file(path: Path, tensors: list[StoredTensor]) -> dict[StoredTensor, str]:
    identity, place = _identity(path), _place(path)
    known = _kept(place, identity)
    missing = [tensor for tensor in tensors if tensor.name not in known]
    if missing:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            known |= dict(zip((tensor.name for tensor in missing), pool.map(_digest, missing), strict=True))
        if _identity(path) == identity:  # else it changed meanwhile
            with suppress(OSError, QrosaError):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_json(place, {"file": identity, "tensors": known})
    return {tensor: known[tensor.name] for tensor in tensors}


def _digest(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for start in range(0, tensor.size, _PIECE):
        digest.update(tensor.raw(start, _PIECE))
    return digest.hexdigest()


def _identity(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]


def _place(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache_folder() / "digests" / f"{name}.json"


def _kept(place: Path, identity: list[int]) -> dict[str, str]:
    try:
        document: dict[str, Any] = read_json(place)
    except (OSError, QrosaError):
        return {}
    tensors = document.get("tensors")
    if document.get("file") != identity or not isinstance(tensors, dict):
        return {}
    return {name: value for name, value in tensors.items() if isinstance(value, str) and len(value) == 64}
