"""What the process takes of host memory beside its tensors, and what streaming keeps there."""

from __future__ import annotations

from qrosa.planner.bytes import components as parts
from qrosa.planner.workload import Workload

MIB = 2**20
CPU_RUNTIME = 440 * MIB  # resident Python, torch, transformers, bitsandbytes and datasets, measured on Linux x86-64
LOAD_RUNTIME = 415 * MIB  # the same before anything has been computed
CUDA_RUNTIME = 2048 * MIB  # the same with a CUDA build and its context's host side
ROW_BYTES = (
    4  # of a token: the rows themselves lie in a file, 28 bytes a row of index here; enough for rows of 7 tokens
)
READING_ROWS = 20 * MIB  # what reading and encoding rows leaves resident of libraries and their caches
EXPORT_BUFFER = 64 * MIB  # the writer's


def process_bytes(work: Workload, *, loading: bool = False) -> dict[str, int]:
    """The process itself, its encoded rows, and its streamed base."""
    made = {"runtime": (LOAD_RUNTIME if loading else CPU_RUNTIME) if work.on_cpu else CUDA_RUNTIME}
    if work.streamed and not work.base_on_disk:
        held = parts.host_base_bytes if work.on_cpu else parts.pinned_base_bytes
        made["pinned_base"] = held(work.shape)
    elif work.streamed and not work.on_cpu:  # two blocks at a time, on their way from the files (qrosa.offload.staging)
        made["pinned_staging"] = parts.STREAM_SLOTS * parts.pinned_bytes(parts.block_bytes(work.shape))
    if work.row_tokens:
        made["rows"] = ROW_BYTES * work.row_tokens + (READING_ROWS if work.on_cpu else 0)
    return made
