"""What a training step asks of a card: operations and bytes, pass by pass.

A step is a few large things, and each is bound by one of the card's rates. Products with the base, the low-rank part
and the head run at a share of the tensor cores' peak; attention at a smaller one. Norms, activations, rotations and
decoding of 4-bit weights move bytes.

The base is frozen, so backward has one product a matrix (dX) where full training has two: 4 N T operations a step, and
2 N T more where the forward pass is recomputed, against 6 N T and 8 N T.

The shares are round figures of what such kernels reach on these cards, not measurements of qrosa.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qrosa.planner.bytes.activations import HALF
from qrosa.planner.bytes.components import base_bytes
from qrosa.planner.cards import Card
from qrosa.planner.workload import Workload

PRODUCT_SHARE = 0.8  # of the peak, in products with thousands of rows
ATTENTION_SHARE = 0.5  # the same in fused attention, and in the gathered products of the sparse gradient
BANDWIDTH_SHARE = 0.8
# Bytes that one-by-one operations read and write for a token, by the width they run over. Two norms, which read and
# write the residual stream once, and two sums; the rotation; gate and up in, their product out; the low-rank part's
# reading of X, its mask, and the sum into Y.
_STREAM, _ROTATION, _INNER, _LOW_RANK_X, _MASK, _LOW_RANK_Y = 20, 18, 6, 2, 4, 4
_SCORES = 24  # eager attention's passes over a score
_LOGITS = 46  # the loss's passes over a logit
_GATHER_WASTE = 16  # multiply-adds for one that is kept, where the sparse gradient gathers (csrc/cuda/sddmm_gather.cuh)
_ACCUMULATE = 10  # for a trained parameter after each micro-batch: its gradient is added to the flat ones


@dataclass(frozen=True)
class Cost:
    """What a stretch of a step asks of the card, in operations and bytes.

    Attributes:
        linear: Operations of products with the base's matrices.
        low_rank: The same with A and B.
        head: The same with the head.
        attention: Operations of attention, and
        sparse: of the sparse gradient, with those that its gathered products waste.
        moved: Bytes read and written in the card's memory, beside the products' own.
    """

    linear: float = 0.0
    low_rank: float = 0.0
    head: float = 0.0
    attention: float = 0.0
    sparse: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, others, strict=True)))

    @property
    def operations(self) -> float:
        """All operations."""
        return self.linear + self.low_rank + self.head + self.attention + self.sparse

    def seconds(self, card: Card) -> float:
        """Time on a card."""
        products = (self.linear + self.low_rank + self.head) / (PRODUCT_SHARE * card.arithmetic)
        gathered = (self.attention + self.sparse) / (ATTENTION_SHARE * card.arithmetic)
        return products + gathered + self.moved / (BANDWIDTH_SHARE * card.bandwidth)


@dataclass(frozen=True)
class Passes:
    """A micro-batch: forward and backward through the layers (with recomputation), and the head with the loss.

    Answers that are compared are scored first, which is ``scoring``: forward passes, the head without its gradient.
    """

    forward: Cost
    recompute: Cost
    backward: Cost
    head: Cost
    scoring: Cost = Cost()

    @property
    def total(self) -> Cost:
        """All of it."""
        return self.forward + self.recompute + self.backward + self.head + self.scoring


def passes(work: Workload) -> Passes:
    """What a micro-batch of ``work.tokens`` asks for, all its rows as long as the longest."""
    dims, tokens = work.shape.dims, work.tokens
    matrices = sum(linear.size for linear in work.shape.linears)
    low_rank = sum(work.allocation.ranks[x.path] * (x.out_features + x.in_features) for x in work.allocation.linears)
    eager = work.attention == "eager"
    keys = work.length if eager else (work.length + 1) / 2
    scores = tokens * keys * dims.query_width * dims.layers
    forward = Cost(2 * tokens * matrices, 2 * tokens * low_rank, attention=4 * scores, moved=_moved(work))
    backward = Cost(
        linear=2 * tokens * matrices,
        low_rank=4 * tokens * low_rank,
        attention=(8 if eager else 10) * scores,  # fused attention computes the scores once more
        sparse=2 * tokens * _gathered(work),
        moved=2 * _moved(work) - _decoding(work) + _ACCUMULATE * work.allocation.trainable,
    )
    recompute = Cost()
    if work.checkpointing:
        recompute = dataclasses.replace(forward, linear=forward.linear - 2 * tokens * _unread(work))
    head = Cost(head=4 * tokens * dims.hidden * dims.vocab, moved=_LOGITS * tokens * dims.vocab)
    read = Cost(head=2 * tokens * dims.hidden * dims.vocab, moved=_LOGITS / 2 * tokens * dims.vocab)
    scoring = sum([forward + read] * work.goal.passes, Cost())
    return Passes(forward, recompute, backward, head, scoring)


def _unread(work: Workload) -> int:
    """Elements of the matrices whose output is not computed again: those of the down projections, where a sum reads it.

    A norm after the block reads it in some families; of those without a formula nothing is known.
    """
    dims = work.shape.dims
    if dims.counted is not None or dims.switches.wide_norms == 4:
        return 0
    return dims.layers * dims.hidden * dims.intermediate


def _gathered(work: Workload) -> float:
    """Multiply-adds a token of the sparse gradient: its positions with their waste, or all of a matrix's."""
    allocation = work.allocation
    return sum(min(_GATHER_WASTE * allocation.nnz[x.path], x.size) for x in allocation.linears)


def _decoding(work: Workload) -> float:
    """Bytes to rebuild every dense weight once: packed ones in, bf16 ones out."""
    return base_bytes(work.shape) + HALF * sum(x.size for x in work.shape.linears)


def _moved(work: Workload) -> float:
    """Bytes that a forward pass through the layers moves beside its products."""
    dims, ranks = work.shape.dims, work.allocation.ranks
    token = dims.layers * (
        _STREAM * dims.hidden + _ROTATION * (dims.query_width + dims.key_width) + _INNER * dims.intermediate
    )
    if work.attention == "eager":
        token += _SCORES * work.length * dims.heads * dims.layers
    reads = _LOW_RANK_X + (_MASK if work.dropout > 0 else 0)
    token += sum(reads * x.in_features + _LOW_RANK_Y * x.out_features for x in work.shape.linears if ranks[x.path])
    return token * work.tokens + _decoding(work)
