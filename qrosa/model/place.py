"""The base as a plan wants it: on the device or streamed from the host; attention, recomputation.

``finetune``, ``plan --probe`` and the commands on finished runs all load here, so what a probe measures is what a run
does, and a run that was trained streamed can be used streamed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qrosa.base.load import Progress, load_base
from qrosa.model.modes import offload_activations, set_attention, set_checkpointing
from qrosa.offload.packing import FlatWeight, from_disk, to_disk, to_host
from qrosa.offload.pool import HostPool
from qrosa.offload.streaming import BaseStream
from qrosa.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qrosa.base.base_files import BaseFiles
    from qrosa.planner.workload import Workload


def load_planned(
    base_files: BaseFiles, work: Workload, device: torch.device, disk: str | None, progress: Progress | None = None
) -> PreTrainedModel:
    """The base in 4 bits, where the plan wants it, computing as the plan counted on.

    Args:
        base_files: The base.
        work: The plan's settings.
        device: Where the model computes.
        disk: Folder for the blocks of a base that is streamed from files.
        progress: Called with (tensors done, tensors in all).

    Raises:
        InputError: Not a model that can be a base.
        StorageError: Damaged files, or a full disk.
    """
    if work.resident_blocks is None:
        model, _ = load_base(base_files, device, progress=progress)
    else:
        model = load_streamed(base_files, device, work.resident_blocks, disk, progress)
    set_attention(model, work.attention, by_row=work.packed)
    set_checkpointing(model, work.checkpointing)
    if work.offload_activations:
        offload_activations(model, device)
    return model


def load_streamed(
    base_files: BaseFiles,
    device: torch.device,
    resident: int,
    disk: str | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A base whose packed layers stay on the host, but for ``resident`` blocks, and visit ``device`` to compute.

    Args:
        base_files: The base.
        device: Where the model computes.
        resident: Decoder blocks that stay on ``device``.
        disk: Folder that the blocks are kept in, None for host memory; what an earlier run left there is used.
        progress: Called with (tensors done, tensors in all).
    """
    flats: dict[str, FlatWeight] = {}
    pool = HostPool(pinned=device.type == "cuda")
    folder = None
    if disk is not None:
        folder = Path(disk).expanduser() / f"{base_files.fingerprint()[:16]}-{device.type}"

    def keep(path: str, flat: FlatWeight | None) -> NF4Weight | None:
        if flat is None:
            return None
        flats[path] = flat
        return flat.weight()

    def place(path: str, weight: NF4Weight) -> NF4Weight:
        placed = keep(path, to_host(weight, pool) if folder is None else to_disk(weight, folder, path))
        assert placed is not None
        return placed

    def stored(path: str, template: NF4Weight) -> NF4Weight | None:
        return keep(path, from_disk(template, folder, path)) if folder is not None else None

    model, _ = load_base(base_files, device, progress=progress, place=place, stored=stored)
    BaseStream(model, flats, device, resident)  # lives on in the model's hooks
    return model
