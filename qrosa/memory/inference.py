"""Where a finished model's base goes when it only computes forward: all on the card, or some blocks streamed.

A run that was trained with a streamed base is often evaluated on the same card, where its base does not fit either.
What else the card has to hold is small without gradients: what is not quantised, the adapter, keys and values of what
was said before, and one layer's workspace or the logits of a chunk.
"""

from __future__ import annotations

from qrosa.memory import parts
from qrosa.memory.activations import HALF, MicroBatch, forward_workspace, rotary_bytes
from qrosa.memory.moments import CUBLAS_WORKSPACE, EVAL_CHUNK
from qrosa.memory.shape import ModelShape

FORWARD_TOKENS = 4096  # of a micro-batch in evaluation, and of a conversation
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
    return parts.unquantised_bytes(shape) + adapter + cache + max(layer, logits) + CUBLAS_WORKSPACE
