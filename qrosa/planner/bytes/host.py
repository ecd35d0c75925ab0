"""What the process takes of host memory beside its tensors, and what streaming keeps there.

On the CPU the largest part is what the C library's heap keeps of freed tensors. It could be had back: blocks above a
threshold come from the system one by one and return to it (``mallopt``). Then resident memory is what tensors take, and
pages of zeros for every new tensor take a third of a training step (measured with a threshold of 1 MiB: system time six
times as high), so the heap stays as it is, and the plan counts a bound that a run holds itself to.
"""

from __future__ import annotations

from qrosa.planner.bytes import components as parts
from qrosa.planner.workload import Workload

MIB = 2**20
CPU_RUNTIME = 440 * MIB  # resident Python, torch, transformers, bitsandbytes and datasets, measured on Linux x86-64
# What the C library keeps of freed tensors on the CPU, as bounds (bench/bench_host_memory.py): something in any phase,
# and by phase a share of what comes and goes. Recomputation makes and frees a layer's activations over and over, which
# cuts the heap up by some layers more. Evaluation finds the heap as training left it, and touches it again. Over many
# steps on rows of many lengths it would grow further: a run gives it back when it nears the plan (qrosa.record.meter).
KEPT_HEAP = 264 * MIB
KEPT_SHARE = {"select": 0.4, "train": 0.4, "eval": 0.45}  # evaluation: of training's
KEPT_LAYERS = 5
CUDA_RUNTIME = 2048 * MIB  # the same with a CUDA build and its context's host side
ROW_BYTES = (
    4  # of a token: the rows themselves lie in a file, 28 bytes a row of index here; enough for rows of 7 tokens
)
EXPORT_BUFFER = 64 * MIB  # the writer's


def process_bytes(work: Workload) -> dict[str, int]:
    """The process itself, its encoded rows, and its streamed base."""
    made = {"runtime": CPU_RUNTIME if work.on_cpu else CUDA_RUNTIME}
    if work.streamed and not work.base_on_disk:
        held = parts.host_base_bytes if work.on_cpu else parts.pinned_base_bytes
        made["pinned_base"] = held(work.shape)
    elif work.streamed and not work.on_cpu:  # two blocks at a time, on their way from the files (qrosa.offload.staging)
        made["pinned_staging"] = parts.STREAM_SLOTS * parts.pinned_bytes(parts.block_bytes(work.shape))
    if work.row_tokens:
        made["rows"] = ROW_BYTES * work.row_tokens
    return made


def kept_bytes(phase: str, passing: int, recomputed: int) -> int:
    """What the C library's heap keeps of freed tensors while a phase runs on the CPU, at the most.

    Args:
        phase: Name of the phase.
        passing: Bytes that come and go; for evaluation, in the training before it.
        recomputed: Activations of a layer that is recomputed, 0 where none is.
    """
    if phase not in KEPT_SHARE:
        return KEPT_HEAP
    layers = KEPT_LAYERS * recomputed
    shared = passing + layers if phase == "eval" else passing
    return KEPT_HEAP + round(KEPT_SHARE[phase] * shared) + (layers if phase != "eval" else 0)
