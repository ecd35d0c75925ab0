"""Activations of one decoder layer: what autograd saves, and what backward needs beside it.

T tokens in a micro-batch, rows of L; d, f, H as in the model; bf16 unless said. The lists follow the transformers
modules with ``qrosa::linear`` in place of their projections: that op saves its input once (shared where several
projections read the same tensor) and drop(X) A^T; ``qrosa::rms_norm`` its input and a scale a row, ``qrosa::gate`` gate
and up; a frozen weight saves nothing. A test holds the sum against the tensors that autograd really saves, family by
family, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass

from qrosa.base.dimensions import Dimensions, LayerCount

HALF, FULL = 2, 4  # bytes of bf16 and fp32
_TILE = 128  # rows of a tile in flash attention's backward
_MULTIPROCESSORS = 170  # of an RTX 5090, the most of any card in qrosa.planner.cards: fewer split less


@dataclass(frozen=True)
class MicroBatch:
    """The micro-batch that takes most memory.

    Attributes:
        tokens: T, padding included.
        length: L, tokens of the longest row.
        rows: Most rows; one row alone needs no attention mask,
        windowed: unless it is longer than the window of sliding attention.
        wide: Products are taken in fp32: attention widens what it reads, and so does a projection while it runs.
        split: On a card, gradients of attention are summed in an order that is always the same.
        packed: Rows lie end to end, and attention goes row by row.
    """

    tokens: int
    length: int
    rows: int
    windowed: bool = False
    wide: bool = False
    split: bool = False
    packed: bool = False

    @property
    def joined(self) -> bool:
        """What attention gives for each row is copied into one tensor."""
        return self.packed and self.rows != 1

    @property
    def product(self) -> int:
        """Bytes of an element that goes into a product."""
        return FULL if self.wide else HALF

    @property
    def mask_elements(self) -> int:
        """Most elements of one attention mask [B, 1, L, L]; packed, of those of all rows.

        When one longest row fills the micro-batch, the worst are two rows of half its length.
        """
        if self.windowed:
            return self.tokens * self.length
        return 0 if self.packed or self.rows == 1 else self.tokens * min(self.length, max(1, self.tokens // 2))


def saved_by_layer(dims: Dimensions, batch: MicroBatch, attention: str, rank_sum: float) -> dict[str, int]:
    """Bytes that one layer saves for backward, by kind of tensor.

    Args:
        dims: The decoder's sizes.
        batch: The micro-batch.
        attention: ``sdpa`` or ``eager``.
        rank_sum: Sum of the ranks of the layer's low-rank parts.

    Returns:
        ``norms``: each RMSNorm's input [T, d] and fp32 scale [T] (LayerNorm: mean and scale); the same for norms on
        queries and keys.
        ``inputs``: X of the projections, [T, d] and [T, heads * head_dim]; for the down projection in ``feed_forward``.
        ``attention``: see below.
        ``feed_forward``: gate, up, and their product, [T, f] each; Phi: GELU's four steps and result.
        ``projected``: drop(X) A^T [T, r].
    """
    if dims.counted is not None:
        return _counted(dims, dims.counted, batch, attention, rank_sum)
    tokens, heads, switches = batch.tokens, dims.heads + dims.kv_heads, dims.switches
    norms = switches.wide_norms * _norm_bytes(dims, batch)
    if dims.head_norms:
        norms += tokens * (HALF * (dims.query_width + dims.key_width) + _scale_bytes(dims) * heads)
    reads = 1 if switches.parallel else 2  # attention and feed-forward read one norm's output, or one each
    return {
        "norms": norms,
        "inputs": HALF * tokens * (reads * dims.hidden + dims.query_width),
        "attention": _saved_attention(dims, batch, attention),
        "feed_forward": switches.inner_saved * HALF * tokens * dims.intermediate,
        "projected": round(HALF * tokens * rank_sum),
    }


def _counted(
    dims: Dimensions, counted: LayerCount, batch: MicroBatch, attention: str, rank_sum: float
) -> dict[str, int]:
    """A family without a formula: what was counted of a row under fused attention, and what else attention may keep.

    That is bounded by what Llama's keeps more under a mask or by the eager kind.
    """
    alone = MicroBatch(batch.tokens, batch.length, rows=1, wide=batch.wide)
    more = _saved_attention(dims, batch, attention) - _saved_attention(dims, alone, "sdpa")
    return {
        "counted": counted.saved(batch.tokens, batch.length),
        "attention": max(0, more),
        "projected": round(HALF * batch.tokens * rank_sum),
    }


def _saved_attention(dims: Dimensions, batch: MicroBatch, attention: str) -> int:
    """Rotated queries and keys, values; then by implementation.

    Eager: keys and values repeated for every query head, probabilities [heads, T, L] in fp32 and bf16, the tanh of
    capped scores. Fused: log-sum-exp fp32 [T, heads]; under a mask, keys and values repeated and the mask in bf16.
    Phi's and Phi-3's partial rotation joins tensors, which gives flash attention's output a layout that has to be
    copied for the projection; Phi-3's values are a view that keeps the whole fused projection alive. Wide: all of it
    in fp32, eager attention's probabilities only so, and the fused kind's output once more than the projection's input.
    Packed rows' outputs are copied where they are joined.
    """
    query, key = batch.product * batch.tokens * dims.query_width, batch.product * batch.tokens * dims.key_width
    if attention == "eager":
        score_bytes = FULL + (0 if batch.wide else HALF) + (batch.product if dims.attention_softcap else 0)
        return 3 * query + score_bytes * batch.tokens * batch.length * dims.heads
    saved, masked = FULL * batch.tokens * dims.heads, batch.product * batch.mask_elements
    if batch.wide:
        saved += query
    elif batch.joined and (masked or not dims.switches.partial_rotation):
        saved += query
    if masked and dims.kv_heads < dims.heads:
        return saved + 3 * query + masked
    fused = query + key if dims.switches.fused_qkv else 0
    copied = query if dims.switches.partial_rotation and not masked else 0
    return saved + query + 2 * key + fused + copied + masked


def mask_bytes(dims: Dimensions, batch: MicroBatch, attention: str) -> int:
    """Attention masks that all layers read; families that mix full and sliding attention keep two kinds.

    Fused attention gets one byte an element, and none at all where rows need no padding; eager attention always adds a
    mask to its scores, in bf16. Packed rows share the longest one's.
    """
    if batch.packed and (attention == "eager" or batch.windowed):
        return dims.masks * (batch.product if attention == "eager" else 1) * batch.length**2
    if attention == "eager":
        return dims.masks * HALF * batch.tokens * batch.length
    return dims.masks * batch.mask_elements


def first_norm_bytes(dims: Dimensions, batch: MicroBatch) -> int:
    """What the first layer's first norm does not save: its input are the frozen embeddings."""
    return _norm_bytes(dims, batch)


def rotary_bytes(dims: Dimensions, batch: MicroBatch) -> int:
    """Cosines and sines [1, L, head_dim] of the rotation, which all layers share; [1, T, head_dim] for packed rows."""
    return 2 * HALF * (batch.tokens if batch.packed else batch.length) * dims.head_dim


def backward_workspace(dims: Dimensions, batch: MicroBatch, attention: str, keeps_scratch: bool) -> int:
    """What the backward pass of one layer holds at its peak, over what the layer saved.

    Backward may peak at any of these, the first for most models. *Entry*, in the down projection: the gradient of the
    layer's output [T, d], of the projection's input [T, f], then the larger of the dense weight and another [T, f]:
    with dropout the low-rank part's term before its mask, or the second of the gradients that the product of gate and
    up gives (by when its own value is free). *Gate and up*, where they are one matrix twice as large: when it is
    decoded in the forward pass, the embeddings [T, d] are there, and no product. *Scores* of eager attention: their
    gradient in fp32 before and after the softmax, by when what came after is free. Families with norms after their
    blocks have backed through the last one at entry. *Counted*, of a family without a formula: a gradient for each
    tensor that the layer saved.

    Args:
        dims: The decoder's sizes.
        batch: The micro-batch.
        attention: ``sdpa`` or ``eager``.
        keeps_scratch: The dense weight's scratch outlives the call (on the CPU) and is counted by itself.
    """
    stream, inner = HALF * batch.tokens * dims.hidden, HALF * batch.tokens * dims.intermediate
    down = 0 if keeps_scratch else HALF * dims.hidden * dims.intermediate
    entry = stream + inner + max(down, inner)
    moments = [entry]
    if dims.switches.wide_norms == 4:
        moments = [entry + stream - _norm_bytes(dims, batch)]
    if dims.switches.fused_gate:
        moments.append(stream - inner + 2 * down)
    if attention == "eager":
        moments.append(_score_workspace(dims, batch))
    elif batch.split:
        moments.append(_flash_workspace(dims, batch))
    if dims.counted is not None:
        moments.append(dims.counted.saved(batch.tokens, batch.length))
    return max(moments) + _widened(dims, batch, backward=True)


def _widened(dims: Dimensions, batch: MicroBatch, *, backward: bool) -> int:
    """fp32 copies that the down projection makes while it runs, where products are wide.

    Input and output; backward the gradients of both, and the input with its elements dropped.
    """
    if not batch.wide:
        return 0
    return FULL * batch.tokens * (dims.hidden + (3 if backward else 1) * dims.intermediate)


def flash_backward_bytes(rows: int, length: int, heads: int, kv_heads: int, width: int, split: bool) -> int:
    """What flash attention's backward allocates inside, bf16 [rows, heads, length, width] (torch's ``flash_api.cpp``).

    dQ summed in fp32 in whole tiles; strictly deterministic once for every part that the card's multiprocessors take of
    it. The row sums of dO * O; dK and dV for every query head where keys are grouped.
    """
    long, wide = -(-length // _TILE) * _TILE, -(-width // 32) * 32
    parts = -(-_MULTIPROCESSORS // (rows * heads)) if split else 1
    summed = FULL * rows * heads * long * (parts * wide + 1)
    return summed + (2 * HALF * rows * heads * length * width if heads != kv_heads else 0)


def _flash_workspace(dims: Dimensions, batch: MicroBatch) -> int:
    """Flash attention's backward in the fewest rows, which are split most; its three gradients, dO and the stream's.

    Free by then: the feed-forward block, the norm and the input that belong to it.
    """
    rows = 1 if batch.packed else max(1, batch.tokens // batch.length)
    inside = flash_backward_bytes(rows, batch.length, dims.heads, dims.kv_heads, dims.head_dim, True)
    stream, query = HALF * batch.tokens * dims.hidden, HALF * batch.tokens * dims.query_width
    gradients = stream + 2 * query + 2 * HALF * batch.tokens * dims.key_width
    freed = dims.switches.inner_saved * HALF * batch.tokens * dims.intermediate
    freed += (dims.switches.wide_norms - 1) * _norm_bytes(dims, batch) + stream
    return inside + gradients - freed


def _score_workspace(dims: Dimensions, batch: MicroBatch) -> int:
    """Softmax's backward in eager attention: two fp32 gradients of the scores, the stream's and the values'.

    Free by then: the feed-forward block with its norms and input, the output projection's input, the bf16 probabilities
    and the repeated values. Packed, one row of them at a time, beside the gradient of all rows' outputs.
    """
    stream, query = HALF * batch.tokens * dims.hidden, HALF * batch.tokens * dims.query_width
    inner = HALF * batch.tokens * dims.intermediate
    scores = (batch.length if batch.joined else batch.tokens) * batch.length * dims.heads
    freed = dims.switches.inner_saved * inner + (dims.switches.wide_norms - 1) * _norm_bytes(dims, batch)
    freed += stream + (1 if batch.joined else 2) * query + HALF * scores
    return 2 * FULL * scores + stream + query - freed


def _norm_bytes(dims: Dimensions, batch: MicroBatch) -> int:
    """What a norm over the residual stream saves: its input [T, d], and a scale for each row."""
    return batch.tokens * (HALF * dims.hidden + _scale_bytes(dims))


def _scale_bytes(dims: Dimensions) -> int:
    """fp32 a row that a norm saves: 1 / rms, or mean and scale."""
    return (2 if dims.switches.layer_norm else 1) * FULL


def norm_workspace(dims: Dimensions, batch: MicroBatch) -> int:
    """The backward pass of a norm over the residual stream: what it saved, and the gradients of output and input."""
    return _norm_bytes(dims, batch) + 2 * HALF * batch.tokens * dims.hidden


def forward_workspace(dims: Dimensions, batch: MicroBatch, attention: str, keeps_scratch: bool) -> int:
    """What one layer holds at its peak when nothing is saved: a norm, the feed-forward block, or attention.

    Beside the embeddings [T, d], which the model holds on to, and the layer's input. Norm: the residual and its normed
    form. Feed-forward: those, gate and up [T, f], with the dense weight, twice as large where they are one, or with
    their product.
    Attention: the normed input, queries, keys and values, repeated ones, the output; for the eager kind scores in bf16,
    fp32, and fp32 after the softmax. In fp32 where products are wide, beside what was widened.
    """
    stream, inner = HALF * batch.tokens * dims.hidden, HALF * batch.tokens * dims.intermediate
    query, key = batch.product * batch.tokens * dims.query_width, batch.product * batch.tokens * dims.key_width
    matrix = 0 if keeps_scratch else HALF * dims.hidden * dims.intermediate
    gate = 2 if dims.switches.fused_gate else 1
    feed_forward = 2 * stream + 2 * inner + max(gate * matrix, inner) + _widened(dims, batch, backward=False)
    attended = stream + 3 * query + 2 * key
    if batch.wide:  # what the fp32 copies are made of
        attended += HALF * batch.tokens * (dims.query_width + 2 * dims.key_width)
    if attention == "eager":
        attended += (HALF + 2 * FULL) * batch.tokens * batch.length * dims.heads
    else:
        attended += query + batch.product * batch.mask_elements
    counted = 0 if dims.counted is None else dims.counted.saved(batch.tokens, batch.length)
    return 2 * stream + max(feed_forward, attended, counted)
