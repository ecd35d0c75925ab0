"""What the C library's heap may keep of freed tensors on the CPU, phase by phase, before it is asked for it.

``qrosa.heap`` holds a run to this. Two things stay out of its hands: pieces between tensors that are in use, which
nobody can give back, and what comes and goes from one look to the next.
"""

from __future__ import annotations

from dataclasses import replace

from qrosa.planner.bytes import components as parts
from qrosa.planner.bytes.activations import MicroBatch, backward_workspace, forward_workspace, norm_workspace
from qrosa.planner.bytes.peaks import PhaseMemory, micro_batch, recomputed_bytes, training_micro_batch
from qrosa.planner.workload import Workload

# Fitted to half of the settings of bench/bench_host_memory.py: in any phase, of what comes and goes in it, and of what
# may come between two looks.
KEPT_HEAP, KEPT_SHARE, KEPT_COMING = 48 * 2**20, 0.06, 0.3
_IN_PASSING = 1.5  # what a layer takes of the heap in evaluation, over what it holds at once: tensors of several sizes


def with_kept_heap(work: Workload, found: dict[str, PhaseMemory]) -> dict[str, PhaseMemory]:
    """Phases on the CPU with what the heap keeps in each; export is a process of its own, which is not held to it."""
    kept = {}
    for name, memory in found.items():
        if name != "export":
            coming = memory.coming or _coming(work, name)
            passing = found["train" if name == "save" else name].passing  # saving finds the pieces that training left
            heap = KEPT_HEAP + round(KEPT_SHARE * passing + KEPT_COMING * coming)
            kept[name] = replace(memory, host=memory.host | {"kept_heap": heap}, coming=coming)
    return found | kept


def _coming(work: Workload, phase: str) -> int:
    """Bytes that may come between two looks at the heap, but for logits, which are looked for by themselves.

    A layer, with what passes in it: quantised layers are looked at one by one.
    """
    if phase == "load":
        return parts.quantise_bytes(parts.largest(work.shape.linears), work.shape.stored_bytes, True)
    if phase == "select":
        return layer_bytes(work, micro_batch(work, work.length, 1))
    if phase == "train":
        return layer_bytes(work, training_micro_batch(work))
    if phase == "eval":
        batch = micro_batch(work, max(work.eval_tokens, work.length), 0)
        return round(_IN_PASSING * forward_workspace(work.shape.dims, batch, work.attention, True))
    return 0


def layer_bytes(work: Workload, batch: MicroBatch) -> int:
    """What a layer saves, and what passes on the way back through it, or through the norm behind the last one."""
    dims = work.shape.dims
    passing = max(backward_workspace(dims, batch, work.attention, True), norm_workspace(dims, batch))
    return recomputed_bytes(work, batch) + passing
