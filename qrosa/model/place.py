"""The base as a plan wants it: on the device or streamed from the host; attention, recomputation, the cap.

``finetune``, ``plan --probe`` and the commands on finished runs all load here, so what a probe measures is what a run
does, and a run that was trained streamed can be used streamed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qrosa.base.load import Progress, load_base
from qrosa.model.modes import make_deterministic, offload_activations, set_attention, set_checkpointing
from qrosa.offload.packing import FlatWeight, to_disk, to_host
from qrosa.offload.pool import HostPool
from qrosa.offload.streaming import BaseStream
from qrosa.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qrosa.base.base_files import BaseFiles
    from qrosa.planner.workload import Workload


def hold_to_cap(device: torch.device, cap: int | None) -> None:
    """On a card: deterministic kernels, and no more of its memory than ``cap`` bytes. Does nothing on the CPU."""
    if device.type != "cuda":
        return
    make_deterministic()
    if cap is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)


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
    set_attention(model, work.attention)
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
        disk: Folder to map the blocks from, None for host memory.
        progress: Called with (tensors done, tensors in all).
    """
    flats: dict[str, FlatWeight] = {}
    pool = HostPool(pinned=device.type == "cuda")

    def keep_on_host(path: str, weight: NF4Weight) -> NF4Weight:
        if disk is None:
            flats[path] = to_host(weight, pool)
        else:
            flats[path] = to_disk(weight, Path(disk).expanduser() / base_files.fingerprint()[:16], path)
        return flats[path].weight()

    model, _ = load_base(base_files, device, progress=progress, place=keep_on_host)
    BaseStream(model, flats, device, resident)  # lives on in the model's hooks
    return model
