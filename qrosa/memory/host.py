"""What the process takes of host memory beside its tensors, and what streaming keeps there.

On the CPU the largest part is what the C library's heap keeps of freed tensors. It could be had back: blocks above a
threshold come from the system one by one and return to it (``mallopt``). Then resident memory is what tensors take, and
pages of zeros for every new tensor take a third of a training step (measured with a threshold of 1 MiB: system time six
times as high), so the heap stays as it is, and the plan counts a bound.
"""

from __future__ import annotations

from qrosa.memory import parts
from qrosa.memory.workload import Workload

MIB = 2**20
CPU_RUNTIME = 440 * MIB  # resident Python, torch, transformers, bitsandbytes and datasets, measured on Linux x86-64
# What the C library keeps of freed tensors on the CPU, as bounds (bench/bench_host_memory.py): something in any phase,
# and by phase a share of what comes and goes. It grows with the number of different sizes, so long training on rows of
# many lengths keeps as much as it frees; recomputation, which makes and frees a layer's activations over and over, some
# layers more. Evaluation finds the heap that training left cut up, and touches it again.
KEPT_HEAP = 224 * MIB
KEPT_OF_SELECTION, KEPT_OF_TRAINING, KEPT_IN_EVALUATION = 0.65, 1.0, 0.65
KEPT_LAYERS = 5
CUDA_RUNTIME = 2048 * MIB  # the same with a CUDA build and its context's host side
ROW_BYTES = 20  # of an encoded token: places in two lists, and its share of the row; counted, and 18 seen resident
EXPORT_BUFFER = 64 * MIB  # the writer's


def process_bytes(work: Workload) -> dict[str, int]:
    """The process itself, its encoded rows, and its streamed base."""
    made = {"runtime": CPU_RUNTIME if work.on_cpu else CUDA_RUNTIME}
    if work.streamed and not work.base_on_disk:
        made["pinned_base"] = parts.host_base_bytes(work.shape, pinned=not work.on_cpu)
    if work.row_tokens:
        made["rows"] = ROW_BYTES * work.row_tokens
    return made


def kept_bytes(phase: str, passing: int, training: int, recomputed: int) -> int:
    """What the C library's heap keeps of freed tensors while a phase runs on the CPU, at the most.

    Args:
        phase: Name of the phase.
        passing: Bytes that come and go in it.
        training: The same in training.
        recomputed: Activations of a layer that is recomputed in training, 0 where none is.
    """
    cut_up = training + KEPT_LAYERS * recomputed
    shares = {"select": KEPT_OF_SELECTION * passing, "train": KEPT_OF_TRAINING * cut_up}
    shares["eval"] = KEPT_IN_EVALUATION * cut_up
    return KEPT_HEAP + round(shares.get(phase, 0.0))
