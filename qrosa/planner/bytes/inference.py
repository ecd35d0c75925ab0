"""Finished models, which only compute forward: all on the card, some blocks streamed, or two models one by one.

A run that was trained with a streamed base is often evaluated on the same card, where its base does not fit either.
What else the card has to hold is small without gradients: what is not quantised, the adapter, keys and values of what
was said before, and one layer's workspace or the logits of a chunk.
"""

from __future__ import annotations

from qrosa.base.shape import ModelShape
from qrosa.planner.bytes import components as parts
from qrosa.planner.bytes.activations import FULL, HALF, MicroBatch, forward_workspace, rotary_bytes
from qrosa.planner.bytes.peaks import EVAL_CHUNK
from qrosa.planner.hardware import UNMEASURED
from qrosa.planner.workload import Workload

FORWARD_TOKENS = 4096  # of a micro-batch in evaluation, and of a conversation
VERIFY_ROWS = 32  # of qrosa.export.verify
_ROOM = 0.95  # of what the driver says is free: the allocator keeps some of it


def resident_blocks(shape: ModelShape, free: int, adapter: int) -> int | None:
    """Decoder blocks that can stay on a card.

    Args:
        shape: The base.
        free: Bytes of the card's memory that nobody uses.
        adapter: Bytes of the adapter.

    Returns:
        None where the whole base fits as it is, else the blocks that stay while the others are streamed, perhaps 0.
    """
    room = _ROOM * free - beside_base_bytes(shape, adapter)
    if parts.base_bytes(shape) <= room:
        return None
    slots = parts.streamed_base_bytes(shape, 0)
    return max(0, min(int((room - slots) // parts.block_bytes(shape)), shape.dims.layers - 1))


def beside_base_bytes(shape: ModelShape, adapter: int) -> int:
    """What a forward pass of 4096 tokens needs on a card beside the base."""
    dims = shape.dims
    tokens = min(FORWARD_TOKENS, dims.max_positions)
    batch = MicroBatch(tokens, tokens, rows=2)
    attention = "eager" if dims.attention_softcap else "sdpa"
    layer = forward_workspace(dims, batch, attention, False) + rotary_bytes(dims, batch)
    cache = 2 * HALF * tokens * dims.key_width * dims.layers
    logits = parts.eval_loss_bytes(dims, tokens, EVAL_CHUNK)
    return parts.unquantised_bytes(shape) + adapter + cache + max(layer, logits) + UNMEASURED.workspace


def verify_bytes(work: Workload) -> dict[str, int]:
    """What ``qrosa export --verify`` needs on the device that it runs on, but for what a process takes anyway.

    One model after the other, rows one by one: ``trained``, the 4-bit base with all else in fp32; ``exported``, 16 bits
    a parameter, beside which the trained one's head is kept. ``recorded``, in host memory: fp32 hidden states of the
    rows of the trained model, and those of the other in 16 bits.
    """
    shape, dims = work.shape, work.shape.dims
    batch = MicroBatch(work.length, work.length, rows=1)
    layer = forward_workspace(dims, batch, work.attention, False) + rotary_bytes(dims, batch)
    logits = 3 * FULL * EVAL_CHUNK * dims.vocab
    adapter = FULL * work.allocation.low_rank_parameters + parts.sparse_bytes(work.allocation)
    trained = parts.base_bytes(shape) + FULL * sum(shape.unquantised.values()) + adapter + 2 * layer
    head = FULL * dims.hidden * dims.vocab
    exported = HALF * shape.base_parameters + head + max(layer, logits)
    recorded = (FULL + HALF) * VERIFY_ROWS * work.length * dims.hidden
    return {"trained": trained, "exported": exported, "peak": max(trained, exported), "recorded": recorded}
