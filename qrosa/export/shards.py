"""Write a checkpoint of any size while holding one tensor: a streaming safetensors writer.

``safetensors.torch.save_file`` wants every tensor of a file in memory at once, so a writer on top of it holds a
whole shard (5 GB by default elsewhere). But a safetensors file is a JSON header followed by the raw tensors, and the
header needs only names, dtypes and shapes, which are all known before the first tensor is computed. So the header
is written first and each tensor follows as soon as it is made::

    [header length: u64 LE] [JSON header, padded with spaces to 8 bytes] [tensor bytes, back to back]

The price is that the tensors must arrive in the order that was announced; `write_shards` checks that they do.
Within a shard wider dtypes would have to come first to be aligned, but a checkpoint here has one dtype (16-bit)
and the header is padded, so every tensor starts at an even offset.

Layout source: the safetensors format description; file names and index as ``transformers.save_pretrained`` writes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from qrosa.files import write_fault, write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
_WRITE_BYTES = 64 * 2**20
_DTYPE_NAMES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.bool: "BOOL", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint and the tensors it holds, in file order."""

    file: str
    specs: tuple[TensorSpec, ...]


def plan_shards(specs: Sequence[TensorSpec], max_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Split tensors over files, in order: a new file starts when the next tensor would not fit.

    Args:
        specs: The tensors, in the order in which they will be written.
        max_bytes: Most tensor bytes in a file; a tensor larger than that gets a file of its own.

    Returns:
        The shards, named as transformers names them: one file has no number.
    """
    groups: list[list[TensorSpec]] = [[]]
    room = max_bytes
    for spec in specs:
        if groups[-1] and spec.nbytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def write_shards(folder: Path, shards: Sequence[Shard], tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Write the tensors into the planned files, one at a time, and the index when there are several files.

    Args:
        folder: An existing folder.
        shards: What `plan_shards` returned.
        tensors: Name and tensor, in exactly the planned order. Each is dropped before the next is asked for.

    Returns:
        The bytes of all tensors.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
        ValueError: A tensor that does not match its spec (a bug in the caller).
    """
    stream = iter(tensors)
    for shard in shards:
        path = folder / shard.file
        with _renamed_when_done(path) as file:
            with storage_errors(path):
                file.write(_header(shard.specs))
            for spec in shard.specs:
                data = _bytes_of(spec, *next(stream, ("", torch.empty(0))))
                with storage_errors(path):
                    _write_in_pieces(file, data)
                del data
    if next(stream, None) is not None:
        raise ValueError("more tensors than planned")
    total = sum(spec.nbytes for shard in shards for spec in shard.specs)
    if len(shards) > 1:
        weight_map = {spec.name: shard.file for shard in shards for spec in shard.specs}
        index: dict[str, object] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)
    return total


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into a `StorageError`, when only `path` is touched inside the block."""
    try:
        yield
    except OSError as error:
        raise write_fault(path, error) from error


@contextmanager
def _renamed_when_done(path: Path) -> Iterator[IO[bytes]]:
    """A file under a temporary name that reaches the disk, then takes its name; removed when the block fails."""
    partial = path.with_name(path.name + ".partial")
    with storage_errors(path):
        file = open(partial, "wb")
    try:
        yield file
        with storage_errors(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            file.close()
        partial.unlink(missing_ok=True)
        raise


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        entries[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(spec: TensorSpec, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as flat uint8 on the CPU, after a check against what was announced."""
    if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
        raise ValueError(f"expected {spec}, got {name!r} {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.detach().reshape(-1).cpu().view(torch.uint8)


def _write_in_pieces(file: IO[bytes], data: torch.Tensor) -> None:
    for start in range(0, data.numel(), _WRITE_BYTES):
        file.write(data[start : start + _WRITE_BYTES].numpy().data)
