"""What lies in memory for longer than a layer: the base, the adapter, gradients, optimizer, statistics, logits.

One function a component, its formula in the docstring, bytes out. N and K are a matrix's sizes; sums run over the
decoder's matrices. Sources: bitsandbytes' NF4 layout for the base, ``qrosa.optim.adamw`` and ``qrosa.train.loss`` for
what training keeps, ``qrosa.masks`` for selection.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from qrosa.adapters.budget import Allocation
from qrosa.adapters.rank_units import LinearShape
from qrosa.base.dimensions import Dimensions
from qrosa.base.shape import ModelShape
from qrosa.masks.passes import STATISTIC_BYTES, group_matrices
from qrosa.masks.sizes import (
    GRAM_TILE,
    POOL_SLACK,
    TOP_K_CHUNK,
    candidates_of,
    candidates_of_model,
    largest_candidates,
)
from qrosa.optim.kinds import OPTIMIZERS
from qrosa.planner.bytes.activations import FULL, HALF
from qrosa.planner.workload import Workload
from qrosa.processor import HEAD_BLOCK

_BLOCK, _NESTED_BLOCK, _CODE_TABLE = 64, 256, 1024
_ALIGNMENT, STREAM_SLOTS, _HOST_CHUNK = 256, 2, 1 << 28  # of qrosa.offload
_LAYOUT_BYTES = 38  # a candidate while flat positions become rows and columns: four int64, and what is kept of it
_FULL_SVD, _OVERSAMPLING = 256, 16  # of qrosa.masks.repair


def nf4_bytes(out_features: int, in_features: int, nested: bool = True) -> int:
    """A packed matrix: half a byte a weight, and an absmax for each block of 64.

    Nested, an absmax is one byte, with an fp32 scale for 256 of them and one fp32 offset; else it is fp32. Without the
    1 KiB table of nested values, which all matrices share.
    """
    size = out_features * in_features
    blocks = -(-size // _BLOCK)
    absmax = blocks + FULL * -(-blocks // _NESTED_BLOCK) + FULL if nested else FULL * blocks
    return -(-size // 2) + absmax


@cache
def base_bytes(shape: ModelShape) -> int:
    """All packed matrices and the one shared table of nested absmax values."""
    packed = sum(nf4_bytes(x.out_features, x.in_features, shape.nested) for x in shape.linears)
    return packed + (_CODE_TABLE if shape.nested else 0)


@cache
def block_bytes(shape: ModelShape) -> int:
    """Packed bytes of the largest decoder block as it is streamed: each tensor is padded to 256 bytes."""
    blocks: dict[int, int] = {}
    for linear in shape.linears:
        blocks[linear.layer] = blocks.get(linear.layer, 0) + _flat_bytes(linear, shape.nested)
    return max(blocks.values())


def _flat_bytes(linear: LinearShape, nested: bool) -> int:
    """A packed matrix as one run of bytes, each of its tensors padded."""
    return sum(-(-part // _ALIGNMENT) * _ALIGNMENT for part in _nf4_tensors(linear, nested))


def _nf4_tensors(linear: LinearShape, nested: bool) -> list[int]:
    """Bytes of codes, absmax and, nested, its scales and offset."""
    blocks = -(-linear.size // _BLOCK)
    absmax = [blocks, FULL * -(-blocks // _NESTED_BLOCK), FULL] if nested else [FULL * blocks]
    return [-(-linear.size // 2), *absmax]


def streamed_base_bytes(shape: ModelShape, resident: int) -> int:
    """What a streamed base has on the device: two slots, the resident blocks, and the one absmax table."""
    slots = min(STREAM_SLOTS, shape.dims.layers - resident)
    return (slots + resident) * block_bytes(shape) + (_CODE_TABLE if shape.nested else 0)


def pinned_bytes(size: int) -> int:
    """What torch's allocator of pinned host memory takes for ``size`` bytes: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


@cache
def host_base_bytes(shape: ModelShape) -> int:
    """A streamed base in host memory, every byte of it written to."""
    return sum(_flat_bytes(linear, shape.nested) for linear in shape.linears)


@cache
def pinned_base_bytes(shape: ModelShape) -> int:
    """The same pinned: chunks (qrosa.offload.pool) that matrices fill in order, each the first with room."""
    room: list[int] = []
    taken = 0
    for linear in shape.linears:
        size = _flat_bytes(linear, shape.nested)
        place = next((index for index, left in enumerate(room) if left >= size), None)
        if place is None:
            chunk = max(_HOST_CHUNK, pinned_bytes(size))
            taken += chunk
            room.append(chunk - size)
        else:
            room[place] -= size
    return taken


@cache
def error_bytes(shape: ModelShape) -> int:
    """The quantisation error of the largest matrix while it is read: two fp32 matrices and one as stored."""
    return (2 * FULL + shape.stored_bytes) * largest(shape.linears)


def factor_bytes(shape: ModelShape, rank: int) -> int:
    """An error while ``qrosa.masks.repair`` decomposes it, and some space to work in.

    By a randomised method: the error and its weighted form, fp32 [N, K], and some six factors of N + K rows and rank +
    16 columns. Small matrices are decomposed whole, with U, V^T, and LAPACK's copies of them.
    """
    most = 0
    for linear in {(x.out_features, x.in_features) for x in shape.linears}:
        size, side = linear[0] * linear[1], min(linear)
        whole = side <= _FULL_SVD or 4 * rank > side
        taken = 4 * size + 8 * side * side if whole else 2 * size + 6 * sum(linear) * (rank + _OVERSAMPLING)
        most = max(most, FULL * taken)
    return most


@cache
def unquantised_bytes(shape: ModelShape) -> int:
    """Embeddings, norms, biases and an untied head, in bf16."""
    return HALF * sum(shape.unquantised.values())


def low_rank_bytes(allocation: Allocation) -> int:
    """A [r, K] and B [N, r] in bf16."""
    return HALF * allocation.low_rank_parameters


def sparse_bytes(allocation: Allocation) -> int:
    """fp32 values, uint16 columns (int32 where K > 65536), int32 row pointers [N + 1]; nothing where nnz is 0."""
    total = 0
    for linear in allocation.linears:
        nnz = allocation.nnz[linear.path]
        column = 2 if linear.in_features <= 1 << 16 else 4
        total += nnz * (FULL + column) + (4 * (linear.out_features + 1) if nnz else 0)
    return total


def flat_gradient_bytes(low_rank: int, sparse: int) -> int:
    """The flat fp32 gradients that micro-batches are added up in."""
    return FULL * (low_rank + sparse)


def micro_batch_gradient_bytes(low_rank: int, sparse: int) -> int:
    """``.grad`` of one micro-batch: bf16 for the low-rank part, fp32 for the sparse part."""
    return HALF * low_rank + FULL * sparse


def optimizer_bytes(low_rank: int, sparse: int, optimizer: str) -> int:
    """The fp32 master of the low-rank part (sparse values are their own), and the states of both parts."""
    states = OPTIMIZERS[optimizer].state_bytes
    return FULL * low_rank + sum(states(size) for size in (low_rank, sparse) if size)


def outer_bytes(low_rank: int, sparse: int) -> int:
    """The common values and their velocity, fp32 in host memory, where machines step on their own."""
    return 2 * FULL * (low_rank + sparse)


def observed(allocation: Allocation, scope: str) -> dict[str, int]:
    """Path -> N * K of the matrices whose statistics selection collects."""
    wanted = [x for x in allocation.linears if scope == "global" or allocation.nnz[x.path]]
    return {x.path: x.size for x in wanted}


def statistic_groups(allocation: Allocation, scope: str, group_bytes: int) -> list[list[str]]:
    """The groups of matrices whose pass may be the largest.

    A pass goes back to its group's first matrix, so earlier groups keep more activations: a later one can only be
    larger if its statistics are.
    """
    sizes = observed(allocation, scope)
    candidates: list[list[str]] = []
    most = 0
    for group in group_matrices(sizes, max(group_bytes, STATISTIC_BYTES * max(sizes.values()))):
        if statistic_bytes(sizes, group) > most:
            most = statistic_bytes(sizes, group)
            candidates.append(group)
    return candidates


def statistic_bytes(sizes: dict[str, int], group: list[str]) -> int:
    """fp32 [N, K] for each matrix of a group."""
    return STATISTIC_BYTES * sum(sizes[path] for path in group)


def top_k_bytes(allocation: Allocation) -> int:
    """The scores of one matrix that may be the k-th largest: values twice, pairs of value and index once; positions."""
    return picking_bytes(max(linear.size for linear in allocation.linears), max(allocation.nnz.values()))


def picking_bytes(size: int, k: int) -> int:
    """The ``k`` best of ``size`` scores: see ``qrosa.masks.topk``; positions are int64, in pieces and joined."""
    return (2 * FULL + 16) * min(size, max(TOP_K_CHUNK, k // 2)) + 16 * k


def candidate_bytes(work: Workload) -> int:
    """Streamed statistics: candidates, in the layout of the delta, and one dense fp32 scratch for the largest matrix.

    Of the whole model, some more until they are cut back, and their fp32 scores, unless the sums are the scores.
    """
    sizes = observed(work.allocation, work.mask_scope)
    widths = {x.path: 2 if x.in_features <= 1 << 16 else 4 for x in work.allocation.linears}
    rows = sum(4 * (x.out_features + 1) for x in work.allocation.linears if x.path in sizes)
    if work.mask_scope == "matrix":
        each = candidates_of(work.allocation.nnz, sizes, work.mask_candidates)
        kept = sum(count * (FULL + widths[path]) for path, count in each.items())
    else:
        total = candidates_of_model(work.allocation.nnz, sizes, work.mask_candidates)
        scores = FULL if work.score.scratch else 0
        kept = round(POOL_SLACK * total) * (FULL + max(widths.values()) + scores)
    return kept + rows + FULL * max(sizes.values())


def looking_bytes(work: Workload) -> int:
    """What passes while one matrix's gradient is looked at: its scores, the choice of the best, their new layout."""
    sizes = observed(work.allocation, work.mask_scope)
    most = largest_candidates(work.allocation.nnz, sizes, work.mask_candidates, work.mask_scope)
    found = 0
    for path, size in sizes.items():
        scores = FULL * work.score.scratch * size + (size if work.mask_scope == "global" else 0)
        choosing = max(picking_bytes(size, most[path]), _LAYOUT_BYTES * most[path])
        reading = (2 * FULL + work.shape.stored_bytes) * size if work.score.reads_error else 0
        found = max(found, scores + choosing, reading)
    return found


def gram_bytes(shape: ModelShape, tokens: int) -> int:
    """The norm of one matrix's gradient: two tiles of dY and X in fp32, and two of their products."""
    tile = min(tokens, GRAM_TILE)
    return 2 * FULL * tile * (max(linear.out_features + linear.in_features for linear in shape.linears) + tile)


def loss_bytes(dims: Dimensions, tokens: int, chunk_tokens: int, wide: bool = False) -> int:
    """From the decoder's last layer to the loss, all tokens supervised in the worst case.

    [T, d]: the final norm's input, its output, its supervised rows and their gradient. A chunk of c positions:
    logits [c, V] in bf16 and fp32 while they are converted, and so is their gradient; or capped and plain, both fp32.
    Where products are ``wide``, in fp32 from the start, beside hidden states and a block of the head in fp32.
    """
    chunk = min(chunk_tokens, tokens)
    each = 2 * FULL if dims.logit_softcap else FULL if wide else FULL + HALF
    widened = FULL * (chunk * dims.hidden + min(HEAD_BLOCK, dims.hidden * dims.vocab)) if wide else 0
    return 4 * HALF * tokens * dims.hidden + each * chunk * dims.vocab + widened


def eval_loss_bytes(dims: Dimensions, tokens: int, chunk_tokens: int) -> int:
    """The same without gradients: hidden states, their supervised rows, and a chunk's logits.

    fp32 beside their bf16 form, or capped in three steps, and the chunk before, which lives until it is replaced; a
    single chunk: fp32 and the exponentials under its log-sum-exp.
    """
    chunk = min(chunk_tokens, tokens)
    each = 3 * FULL if dims.logit_softcap else FULL + HALF
    each = each + FULL if tokens > chunk else max(each, 2 * FULL)
    return 2 * HALF * tokens * dims.hidden + each * chunk * dims.vocab


def quantise_bytes(linear_size: int, stored_bytes: int, on_cpu: bool) -> int:
    """A matrix while it is quantised: as stored, its absmax, and three fp32 copies in bitsandbytes' CPU code."""
    return (stored_bytes + (3 * FULL if on_cpu else 0)) * linear_size + 2 * FULL * -(-linear_size // _BLOCK)


def largest(linears: Iterable[LinearShape]) -> int:
    """N * K of the largest matrix."""
    return max(linear.size for linear in linears)
