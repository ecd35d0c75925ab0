"""The settings that a plan may choose from, in the order in which its levers usually pay.

Smaller loss chunks are nearly free. Then activations are recomputed, which costs a third more arithmetic, but is better
than micro-batches too small to keep the device busy. On a card, what recomputation keeps then moves to the host, and
after it the base, of which as many blocks stay as fit: at a busy micro-batch their copies hide behind the arithmetic.
Last, the micro-batch goes down to a single row. The effective batch never changes. On a card the order only breaks
ties: the estimated time of a step decides (``solve``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from qrosa.adapters.budget import Allocation
from qrosa.data.length import row_length
from qrosa.masks.scores import MASK_SCORES
from qrosa.masks.sizes import LEAST_CANDIDATES
from qrosa.planner.request import Request
from qrosa.planner.workload import Workload
from qrosa.quantities import parse_offload

# Tokens of a micro-batch: above the first figure a device gains nothing more, below the second it idles. On a card
# products of 2k rows and more run near peak; on a CPU the time to decode 4-bit weights is a few per cent at 512 rows.
WANTED_TOKENS = {"cuda": 8192, "cpu": 2048}
BUSY_TOKENS = {"cuda": 2048, "cpu": 512}
# On a CPU eager attention's backward is the faster one up to rows of about this length (SmolLM2-135M: 1.6 s a step
# against 2.1 at 90 tokens, even at 256, 4.3 against 3.5 at 600).
EAGER_TOKENS = 256
LOSS_CHUNKS = (256, 128, 64)


@dataclasses.dataclass(frozen=True)
class _Lever:
    """One way to hold activations and base."""

    checkpointing: bool
    activations: bool
    base: bool


def _levers(request: Request) -> list[_Lever]:
    """The ways that the settings leave open, the fastest first.

    Offload is tried by itself on a card only: on the CPU device and host are one memory.
    """
    chosen = parse_offload(request.train.offload)
    open_ = request.device == "cuda"
    ways = []
    for checkpointing, activations, base in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1)):
        lever = _Lever(bool(checkpointing), bool(activations), bool(base))
        asked = {"auto": lever.checkpointing, "on": True, "off": False}[request.train.checkpointing]
        allowed = all(
            wanted == has if wanted is not None else open_ or not has
            for wanted, has in ((chosen.activations, lever.activations), (chosen.base, lever.base))
        )
        if allowed and asked == lever.checkpointing:
            ways.append(lever)
    if chosen.activations is None and len(ways) > 1:
        ways = [way for way in ways if way != _Lever(True, False, True)]  # activations move before the base does
    return ways


def candidates(request: Request, allocation: Allocation) -> Iterator[Workload]:
    """Workloads from the fastest to the smallest: every way with a busy device, then the smallest with less."""
    first = _first(request, allocation)
    ways = _levers(request)
    for way in ways:
        yield from _sized(request, first, way, down_to_one_row=request.device == "cuda")
    resident = [way for way in ways if way.checkpointing and not way.base]
    for way in dict.fromkeys([*resident[-1:], ways[-1]]):
        if way.checkpointing or request.train.checkpointing == "off":
            yield from _sized(request, first, way, down_to_one_row=True)


def _sized(request: Request, first: Workload, way: _Lever, *, down_to_one_row: bool) -> Iterator[Workload]:
    sizes = [(first.rows, tokens) for tokens in _token_ladder(request, first.length, down_to_one_row=down_to_one_row)]
    if sizes[-1][1] == first.length and first.rows > 1:
        sizes.append((1, first.length))  # never two short rows beside each other: no row is padded, so no mask
    for rows, tokens in sizes:
        for chunk in LOSS_CHUNKS:
            yield dataclasses.replace(
                first,
                rows=rows,
                checkpointing=way.checkpointing,
                offload_activations=way.activations,
                resident_blocks=0 if way.base else None,
                base_on_disk=way.base and parse_offload(request.train.offload).disk is not None,
                tokens=tokens,
                loss_chunk_tokens=min(chunk, tokens),
            )


def _first(request: Request, allocation: Allocation) -> Workload:
    train, dims = request.train, request.shape.dims
    seq_len = row_length(request.data.seq_len, dims.max_positions)
    length = min(seq_len, request.rows.longest or seq_len)
    fixed = train.micro_batch != "auto"
    score = MASK_SCORES[request.masks.mask_score]
    return Workload(
        shape=request.shape,
        allocation=allocation,
        device=request.device,
        attention=_attention(request, length),
        optimizer=train.optimizer,
        dropout=request.adapter.dropout if allocation.low_rank_parameters else 0.0,
        mask_score=request.masks.mask_score,
        mask_scope=request.masks.mask_scope,
        length=length,
        rows=min(int(train.micro_batch), train.step_rows) if fixed else train.step_rows,
        tokens=length,
        eval_tokens=length,
        checkpointing=False,
        loss_chunk_tokens=LOSS_CHUNKS[0],
        mask_group_bytes=0,
        checkpoints=train.keep + train.keep_best,
        sparse_init=request.adapter.sparse_init,
        low_rank_init=request.adapter.low_rank_init,
        rank_by=request.adapter.rank_by or "order",
        row_tokens=request.rows.tokens,
        zero=request.zero,
        processes=request.processes,
        mask_candidates=LEAST_CANDIDATES if request.masks.mask_selection == "stream" and score.reads_gradients else 0,
        deterministic=train.deterministic == "on",
        overhead=request.overhead,
        feedback=train.base_rounding == "feedback",
        widens=request.widens,
        objective=train.objective,
        samples=train.samples,
        packed=train.packing == "on",
        sync_every=train.sync_every,
    )


def _attention(request: Request, length: int) -> str:
    """``eager`` where scores are capped, which fused kernels cannot do, and for short rows on a CPU; else ``sdpa``.

    In fp32 the fused kind is the faster one at every length (64 to 512 tokens: 1.2 to 1.7 times).
    """
    short = request.device == "cpu" and not request.widens and length <= EAGER_TOKENS
    return "eager" if short or request.shape.dims.attention_softcap else "sdpa"


def _token_ladder(request: Request, length: int, *, down_to_one_row: bool) -> list[int]:
    """Sizes of a micro-batch in tokens, falling; a fixed micro-batch has one."""
    train = request.train
    if train.micro_batch != "auto":
        return [_most_tokens(request, min(int(train.micro_batch), train.step_rows), length)]
    tokens = max(length, min(WANTED_TOKENS[request.device], _most_tokens(request, train.step_rows, length)))
    floor = length if down_to_one_row else max(length, min(tokens, BUSY_TOKENS[request.device]))
    ladder = [tokens]
    while ladder[-1] > floor:
        ladder.append(max(floor, ladder[-1] // 2))
    return ladder


def _most_tokens(request: Request, rows: int, length: int) -> int:
    """The most tokens of so many rows of a step: padded they are as long as the longest, packed as long as they are."""
    most = request.rows.most
    if request.train.packing != "on" or len(most) < rows:
        return rows * length
    return sum(min(one, length) for one in most[:rows])
