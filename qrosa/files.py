"""Files as this package reads and writes them: JSON, text and safetensors, nothing that can run code.

Every write goes to a temporary name beside its target and is renamed when it is whole. Headers of safetensors files are
read here without torch, both to open foreign files with care (every size is checked before a byte of data is trusted)
and to plan from a checkpoint's shapes alone. The format: 8 bytes little-endian header length, a JSON header (name ->
dtype, shape, byte range), then the data, back to back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrosa.errors import InputError, StorageError

if TYPE_CHECKING:
    from torch import Tensor


_MAX_HEADER = 100 * 2**20  # the limit of the safetensors library itself


DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

# Of the format, and of no model that can be read here.
_OTHER_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")


Header = dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]


def read_safetensors_header(path: str | Path) -> tuple[Header, int]:
    """Read and check the header of a safetensors file.

    Returns:
        Name -> (dtype as the format names it, shape, (first byte, end byte) within the data), and the file offset at
        which the data starts.

    Raises:
        InputError: The file does not exist.
        StorageError: The file cannot be read, is cut short, or its header lies about the data.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise _damaged(path, f"it has {size} bytes and announces a header of {length}")
            raw = file.read(length)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", "check the path, or copy the missing file") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{path} cannot be read: {reason}", "check the file's permissions") from None
    try:
        parsed = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or a number of thousands of digits
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(parsed, dict):
        raise _damaged(path, "its header is not a JSON object")
    parsed.pop("__metadata__", None)
    header = {str(name): _check_entry(path, name, entry) for name, entry in parsed.items()}
    end = 0
    for _, _, (first, last) in sorted(header.values(), key=lambda entry: entry[2]):
        if first != end:
            raise _damaged(path, "its tensors overlap or leave gaps")
        end = last
    if 8 + length + end != size:
        raise _damaged(path, f"it should have {8 + length + end} bytes and has {size}")
    return header, 8 + length


def _check_entry(path: str | Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    kind = entry.get("dtype") if isinstance(entry, dict) else None
    if kind in _OTHER_DTYPES:
        raise InputError(
            f"{path} stores {str(name)[:80]!r} as {kind}, which is not supported",
            "use a checkpoint in bf16, fp16 or fp32",
        )
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
        fits = whole and last - first == math.prod(shape) * DTYPE_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise _damaged(path, f"the entry of tensor {str(name)[:80]!r} does not add up")
    return dtype, shape, (first, last)


def _damaged(path: str | Path, why: str) -> StorageError:
    return StorageError(f"{path} is not a sound safetensors file: {why}", "copy or download the file again")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        InputError: The file does not exist.
        StorageError: It cannot be read or does not hold a JSON object.
    """
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", "check the path, or copy the missing file") from None
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or a number of thousands of digits
        raise StorageError(f"{path} is not valid JSON", "copy or download the file again") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{path} cannot be read: {reason}", "check the file's permissions") from None
    if not isinstance(loaded, dict):
        raise StorageError(f"{path} does not hold a JSON object", "copy or download the file again")
    return loaded


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write one JSON object under a temporary name, then rename it into place."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it into place.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link that someone left there must not be written through
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        put_in_place(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_fault(path, error) from None


def put_in_place(temporary: Path, path: str | Path) -> None:
    """Rename a finished file or folder, so that a power cut leaves either the old one or the new one, whole.

    Raises:
        OSError: Whatever the system says.
    """
    flush_to_disk(temporary)
    os.replace(temporary, path)
    flush_to_disk(Path(path).parent)


def flush_to_disk(path: Path) -> None:
    """Ask the system to put a file or folder on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where encoded rows lie while a command runs, and digests of bases between commands.

    ``QROSA_CACHE``, or ``qrosa`` in the user's cache folder; not the system's folder for temporary files, which on many
    machines is memory.
    """
    base = os.environ.get("QROSA_CACHE")
    if base:
        return Path(base).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qrosa"


def file_digest(path: str | Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as manifests hold them: ``{"bytes", "sha256"}``."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def document_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON document, whatever the order of its keys and its spaces."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_fault(path: str | Path, error: OSError) -> StorageError:
    """The error for a write that failed."""
    reason = error.strerror or str(error)
    return StorageError(f"{path} cannot be written: {reason}", "check free disk space and the folder's permissions")


def write_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name, then rename it into place.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = Path(f"{path}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        put_in_place(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        fault = error if isinstance(error, OSError) else OSError(str(error))
        raise write_fault(path, fault) from None


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a whole safetensors file, its header checked first.

    Raises:
        InputError: The file does not exist.
        StorageError: It is damaged or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_safetensors_header(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None
