"""A quantised layer as one flat run of bytes, so that it moves to the card in one copy.

The tensors of an ``NF4Weight`` lie end to end, each aligned to 256 bytes; the absmax map, the same 1 KiB for every
layer, stays out of it and on the card. A flat layer lives in one of two places: host memory, pinned where a card reads
it, or a safetensors file that is mapped into memory, for hosts that have less memory than the base takes.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from qrosa.errors import InputError, StorageError
from qrosa.files import read_safetensors_header, write_tensors
from qrosa.offload.pool import HostPool
from qrosa.quant.nf4 import NF4Weight

ALIGNMENT = 256
_DATA, _CODE = "data", "absmax_code"  # tensors of a layer's file
_TENSORS = ("codes", "absmax", "absmax_scale", "absmax_offset")


@dataclass(frozen=True)
class FlatWeight:
    """One layer's packed bytes and how to read them.

    Attributes:
        data: uint8 [nbytes], in host memory or mapped from a file.
        template: The weight's shape, dtype and absmax map, its tensors on the meta device.
        offsets: Byte offset of each tensor in ``data``, by attribute name.
        path: The file that ``data`` is mapped from, None for host memory.
        start: Where in the file ``data`` begins.
    """

    data: Tensor
    template: NF4Weight
    offsets: dict[str, int]
    path: Path | None = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Size of ``data``."""
        return self.data.numel()

    def views(self, data: Tensor, absmax_code: Tensor | None) -> NF4Weight:
        """The layer's tensors as views of ``data``, a flat buffer that holds (a copy of) this layer's bytes.

        Args:
            data: uint8, at least ``nbytes`` long.
            absmax_code: The absmax map on the same device, None when absmax is not nested.
        """
        tensors: dict[str, Any] = {}
        for name, offset in self.offsets.items():
            like = getattr(self.template, name)
            piece = data[offset : offset + like.numel() * like.element_size()]
            tensors[name] = piece.view(like.dtype).view(like.shape)
        return dataclasses.replace(self.template, absmax_code=absmax_code, **tensors)

    def weight(self) -> NF4Weight:
        """The layer as it lies on the host."""
        return self.views(self.data, self.template.absmax_code)


def flat_layout(weight: NF4Weight) -> tuple[dict[str, int], int]:
    """Offset of each tensor, and the bytes of all of them."""
    offsets, end = {}, 0
    for name, tensor in weight.tensors().items():
        if name in _TENSORS:
            offsets[name] = end
            size = tensor.numel() * tensor.element_size()
            end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def to_host(weight: NF4Weight, pool: HostPool) -> FlatWeight:
    """Copy a layer into one run of bytes in host memory.

    Args:
        weight: On any device.
        pool: Where the bytes come from; one for a whole base.
    """
    offsets, nbytes = flat_layout(weight)
    data = pool.take(nbytes)
    _write(weight, offsets, data)
    return FlatWeight(data, _template(weight), offsets)


def to_disk(weight: NF4Weight, folder: Path, name: str) -> FlatWeight:
    """Write a layer to ``folder/name.safetensors`` and map it.

    Raises:
        InputError: ``folder`` is not a folder.
        StorageError: The disk is full or the folder cannot be written.
    """
    offsets, nbytes = flat_layout(weight)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{folder} is not a folder", "give a folder on a fast disk") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{folder} cannot be written: {reason}", "check the folder's permissions") from None
    data = torch.empty(nbytes, dtype=torch.uint8)
    _write(weight, offsets, data)
    code = {} if weight.absmax_code is None else {_CODE: weight.absmax_code.cpu()}
    write_tensors(folder / f"{name}.safetensors", {_DATA: data, **code})
    flat = from_disk(_template(weight), folder, name)
    assert flat is not None
    return flat


def from_disk(template: NF4Weight, folder: Path, name: str) -> FlatWeight | None:
    """Map a layer that an earlier run wrote, None where there is none of this size.

    Args:
        template: The layer's shape, dtype and kind of absmax, its tensors on the meta device.
        folder: Named after the base, and after the kind of device that quantised it: their roundings differ.
        name: Of the layer.
    """
    path = folder / f"{name}.safetensors"
    offsets, nbytes = flat_layout(template)
    if not path.is_file():
        return None
    try:
        header, begin = read_safetensors_header(path)
    except StorageError:  # of a disk that failed: written again
        return None
    if _DATA not in header or header[_DATA][1] != (nbytes,) or (_CODE in header) != (template.absmax_code is not None):
        return None
    code = None
    if _CODE in header:
        with safe_open(path, "pt") as file:
            code = file.get_tensor(_CODE)
    start = begin + header[_DATA][2][0]
    mapped = np.memmap(path, dtype=np.uint8, mode="c", offset=start, shape=(nbytes,))
    return FlatWeight(
        torch.from_numpy(mapped), dataclasses.replace(template, absmax_code=code), offsets, path.absolute(), start
    )


def free_disk(folder: Path) -> int:
    """Bytes free where ``folder`` is or would be."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    stats = os.statvfs(existing)
    return stats.f_bavail * stats.f_frsize


def _write(weight: NF4Weight, offsets: dict[str, int], data: Tensor) -> None:
    data.zero_()  # the gaps of the alignment are written to disk too
    for name, offset in offsets.items():
        tensor = getattr(weight, name)
        data[offset : offset + tensor.numel() * tensor.element_size()] = tensor.reshape(-1).view(torch.uint8).cpu()


def _template(weight: NF4Weight) -> NF4Weight:
    meta = weight.to("meta")
    code = None if weight.absmax_code is None else weight.absmax_code.cpu()
    return dataclasses.replace(meta, absmax_code=code)
