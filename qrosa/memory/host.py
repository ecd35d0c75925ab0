"""What the process takes of host memory beside its tensors, and what streaming keeps there."""

from __future__ import annotations

from qrosa.memory import parts
from qrosa.memory.workload import Workload

MIB = 2**20
CPU_RUNTIME = 480 * MIB  # resident Python, torch, transformers, bitsandbytes and datasets, measured on Linux x86-64
# What the C library keeps of freed tensors while a phase runs on the CPU: resident sizes of SmolLM2 runs less the bytes
# of their tensors, over six settings: some 200 MiB and 0.55 to 0.72 of what came and went, more where little did.
KEPT_HEAP, KEPT_SHARE = 256 * MIB, 0.65
CUDA_RUNTIME = 2048 * MIB  # the same with a CUDA build and its context's host side
ROW_BYTES = 20  # of an encoded token: places in two lists, and its share of the row; counted, and 18 seen resident
EXPORT_BUFFER = 64 * MIB  # the writer's


def process_bytes(work: Workload, passing: int) -> dict[str, int]:
    """The process itself, its pinned base, and on the CPU what its heap keeps of ``passing`` bytes that come and go."""
    made = {"runtime": CPU_RUNTIME if work.on_cpu else CUDA_RUNTIME}
    if work.streamed and not work.base_on_disk:
        made["pinned_base"] = parts.host_base_bytes(work.shape, pinned=not work.on_cpu)
    if work.row_tokens:
        made["rows"] = ROW_BYTES * work.row_tokens
    if work.on_cpu:
        made["kept_heap"] = KEPT_HEAP + round(KEPT_SHARE * passing)
    return made
