"""Activations of one decoder layer: what autograd saves, and what backward needs beside it.

T tokens in a micro-batch, rows of L; d, f, H as in the model; bf16 unless said. The lists follow the transformers
modules with ``qrosa::linear`` in place of their projections: that op saves its input once (shared where several
projections read the same tensor) and drop(X) A^T; norms save their fp32 input; a frozen weight saves nothing. A test
holds the sum against the tensors that autograd really saves, family by family, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass

from qrosa.memory.families import Dimensions

HALF, FULL = 2, 4  # bytes of bf16 and fp32


@dataclass(frozen=True)
class MicroBatch:
    """The micro-batch that takes most memory.

    Attributes:
        tokens: T, padding included.
        length: L, tokens of the longest row.
        rows: Most rows; one row alone needs no attention mask.
    """

    tokens: int
    length: int
    rows: int

    @property
    def mask_elements(self) -> int:
        """Most elements of one attention mask [B, 1, L, L].

        When one longest row fills the micro-batch, the worst are two rows of half its length.
        """
        return 0 if self.rows == 1 else self.tokens * min(self.length, max(1, self.tokens // 2))


def saved_by_layer(dims: Dimensions, batch: MicroBatch, attention: str, rank_sum: float) -> dict[str, int]:
    """Bytes that one layer saves for backward, by kind of tensor.

    Args:
        dims: The decoder's sizes.
        batch: The micro-batch.
        attention: ``sdpa`` or ``eager``.
        rank_sum: Sum of the ranks of the layer's low-rank parts.

    Returns:
        ``norms``: each RMSNorm's fp32 input [T, d] and scale [T] (LayerNorm: bf16 input, fp32 mean and scale); the same
        for norms on queries and keys; Gemma's 1 + weight in fp32.
        ``inputs``: X of the projections, [T, d] and [T, heads * head_dim]; for the down projection in ``feed_forward``.
        ``attention``: see below.
        ``feed_forward``: gate, its activation, up, and their product, [T, f] each; Phi: GELU's four steps and result.
        ``projected``: drop(X) A^T [T, r].
    """
    tokens, heads = batch.tokens, dims.heads + dims.kv_heads
    layer_norm = dims.family == "phi"
    width, scales = (HALF, 2 * FULL) if layer_norm else (FULL, FULL)
    norms = dims.wide_norms * tokens * (width * dims.hidden + scales)
    if dims.head_norms:
        norms += tokens * (width * (dims.query_width + dims.key_width) + scales * heads)
    if dims.family.startswith("gemma"):
        norms += FULL * (dims.wide_norms * dims.hidden + (2 * dims.head_dim if dims.head_norms else 0))
    reads = 1 if layer_norm else 2  # attention and feed-forward read one norm's output, or one each
    return {
        "norms": norms,
        "inputs": HALF * tokens * (reads * dims.hidden + dims.query_width),
        "attention": _saved_attention(dims, batch, attention),
        "feed_forward": (5 if layer_norm else 4) * HALF * tokens * dims.intermediate,
        "projected": round(HALF * tokens * rank_sum),
    }


def _saved_attention(dims: Dimensions, batch: MicroBatch, attention: str) -> int:
    """Rotated queries and keys, values; then by implementation.

    Eager: keys and values repeated for every query head, probabilities [heads, T, L] in fp32 and bf16, the tanh of
    capped scores. Fused: log-sum-exp fp32 [T, heads]; under a mask, keys and values repeated and the mask in bf16.
    Phi's and Phi-3's partial rotation joins tensors, which gives the output a layout that has to be copied for the
    projection; Phi-3's values are a view that keeps the whole fused projection alive.
    """
    query, key = HALF * batch.tokens * dims.query_width, HALF * batch.tokens * dims.key_width
    if attention == "eager":
        score_bytes = FULL + HALF + (HALF if dims.attention_softcap else 0)
        return 3 * query + score_bytes * batch.tokens * batch.length * dims.heads
    saved = FULL * batch.tokens * dims.heads + (query if dims.family in ("phi", "phi3") else 0)
    if batch.mask_elements and dims.kv_heads < dims.heads:
        return saved + 3 * query + HALF * batch.mask_elements
    fused = query + key if dims.family == "phi3" else 0
    return saved + query + 2 * key + fused + HALF * batch.mask_elements


def mask_bytes(dims: Dimensions, batch: MicroBatch) -> int:
    """Attention masks that every layer reads, as bool and in bf16; sliding-window families keep two kinds."""
    return dims.masks * (1 + HALF) * batch.mask_elements


def backward_workspace(
    dims: Dimensions, batch: MicroBatch, attention: str, dropout: float, largest_matrix: int, keeps_scratch: bool
) -> int:
    """What the backward pass of one layer holds at its peak beside everything that the layer saved.

    The peak is where backward enters the layer, in the down projection: the gradients of the residual stream and of the
    layer's output [T, d], of its input [T, f], then either the dense weight (bf16 [N, K]) or, with dropout, the
    low-rank part's term [T, f] before and after its mask. Eager attention has a peak of its own: the gradients of the
    scores in bf16 and fp32, twice, by which time what the feed-forward block saved is free again.

    Args:
        dims: The decoder's sizes.
        batch: The micro-batch.
        attention: ``sdpa`` or ``eager``.
        dropout: Of the low-rank part.
        largest_matrix: N * K of the layer's largest matrix.
        keeps_scratch: The dense weight's scratch outlives the call (on the CPU) and is counted by itself.
    """
    tokens = batch.tokens
    term = 2 * HALF * tokens * dims.intermediate if dropout > 0 else 0
    weight = 0 if keeps_scratch else HALF * largest_matrix
    stream = 2 * HALF * tokens * dims.hidden
    entry = stream + HALF * tokens * dims.intermediate + max(term, weight)
    if attention == "sdpa":
        return entry
    scores = 2 * (HALF + FULL) * tokens * batch.length * dims.heads
    return max(entry, stream + scores - 4 * HALF * tokens * dims.intermediate)


def forward_workspace(dims: Dimensions, batch: MicroBatch, attention: str) -> int:
    """What one layer holds at its peak when nothing is saved: a norm, the feed-forward block, or attention.

    Norm: the residual in bf16 and fp32, its square in fp32, the output. Feed-forward: the residual and its normed input
    [T, d], the activation, up and their product [T, f]. Attention: the residual, queries, keys, values and output, and
    for the eager kind the scores, bf16 twice and fp32 twice.
    """
    tokens = batch.tokens
    norm = (2 * FULL + 2 * HALF) * tokens * dims.hidden
    feed_forward = HALF * tokens * (2 * dims.hidden + 3 * dims.intermediate)
    attended = HALF * tokens * (dims.hidden + 4 * dims.query_width)
    if attention == "eager":
        attended += 2 * (HALF + FULL) * tokens * batch.length * dims.heads
    return max(norm, feed_forward, attended)
