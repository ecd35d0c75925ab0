"""From a memory cap to settings: the fastest candidate that fits.

Candidates are tried in the order in which the levers pay. Smaller loss chunks are nearly free. Then activations are
recomputed, which costs a third more arithmetic, but is better than micro-batches too small to keep the device busy. On
a card, what recomputation keeps then moves to the host, and after it the base, of which as many blocks stay as fit: at
a busy micro-batch their copies hide behind the arithmetic. Last, the micro-batch goes down to a single row. The
effective batch never changes. Mask statistics take most of what memory is left in their own phase: fewer bytes mean
more passes, not other masks.

Checking a candidate is arithmetic, so all of them together cost milliseconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from qrosa.adapters.budget import Allocation, allocate
from qrosa.config import AdapterConfig, DataConfig, MaskConfig, TrainConfig
from qrosa.errors import InputError
from qrosa.memory import parts
from qrosa.memory.estimate import Machines
from qrosa.memory.hardware import card_memory, host_memory
from qrosa.memory.model import GRADIENT_SCORES, Workload, phases
from qrosa.memory.plan import Plan, Request, size_text
from qrosa.memory.shape import ModelShape
from qrosa.quantities import parse_offload, parse_size

DEFAULT_SEQ_LEN = 2048
# Tokens of a micro-batch: above the first figure a device gains nothing more, below the second it idles. On a card
# products of 2k rows and more run near peak; on a CPU the time to decode 4-bit weights is a few per cent at 512 rows.
WANTED_TOKENS = {"cuda": 8192, "cpu": 2048}
BUSY_TOKENS = {"cuda": 2048, "cpu": 512}
EVAL_TOKENS = 4096
# On a CPU eager attention's backward is the faster one up to rows of about this length (SmolLM2-135M: 1.6 s a step
# against 2.1 at 90 tokens, even at 256, 4.3 against 3.5 at 600).
EAGER_TOKENS = 256
LOSS_CHUNKS = (256, 128, 64)
STATISTICS_SHARE = 0.9  # of the memory that selection leaves: one more pass is cheaper than running out


def plan(
    model: str | ModelShape,
    adapter: AdapterConfig,
    masks: MaskConfig,
    data: DataConfig,
    train: TrainConfig,
    *,
    vram: int | None = None,
    longest_row: int | None = None,
    device: str | None = None,
    allocation: Allocation | None = None,
    machines: Machines | None = None,
) -> Plan:
    """Plan a run.

    Args:
        model: What the user named, or its shape.
        adapter: Budget settings.
        masks: Mask settings.
        data: Data settings.
        train: Training settings.
        vram: Bytes that may be used; default ``train.vram``, else the card's memory, else what the host has free.
        longest_row: Tokens of the longest row, where rows are known; else rows are taken to fill ``seq_len``.
        device: ``cuda`` or ``cpu``; default a card where ``vram`` is given or a card is found.
        allocation: Where the trained parameters are; default from the budget.
        machines: What to estimate the time of a step on; its card's memory is the cap where none is set.

    Returns:
        The fastest settings that fit, or the smallest ones, with ``fits`` false.

    Raises:
        InputError: A model, a budget or a setting that cannot be.
    """
    shape = ModelShape.from_source(model) if isinstance(model, str) else model
    if vram is None and train.vram is not None:
        vram = parse_size(train.vram, "--vram")
    if vram is None and machines is not None:
        vram = machines.card.memory
    card = None if vram is not None and device is not None else card_memory()
    device = device or ("cuda" if vram is not None or card else "cpu")
    cap = vram if vram is not None else card if device == "cuda" and card else host_memory()
    seq_len = _seq_len(data, shape)
    request = Request(
        shape, adapter, masks, dataclasses.replace(data, seq_len=seq_len), train, device, cap, longest_row, machines
    )
    return solve(request, allocation)


def _seq_len(data: DataConfig, shape: ModelShape) -> int:
    limit = shape.dims.max_positions
    if data.seq_len is None:
        return min(DEFAULT_SEQ_LEN, limit)
    if data.seq_len > limit:
        raise InputError(f"--seq-len {data.seq_len} is more than the model reads ({limit})", f"use at most {limit}")
    return data.seq_len


def solve(request: Request, allocation: Allocation | None = None) -> Plan:
    """Choose the settings of a request whose device and cap are known: the fastest that fit, else the smallest."""
    allocation = allocation or allocate(request.adapter, request.shape.linears, request.shape.base_parameters)
    for candidate in _candidates(request, allocation):
        if _bare(request, candidate).fits:
            made = _made(request, candidate)
            if made.fits:
                return made
    return _made(request, candidate)


def solve_smallest(request: Request) -> Plan:
    """The settings that take least memory, whether or not larger ones would fit."""
    allocation = allocate(request.adapter, request.shape.linears, request.shape.base_parameters)
    return _made(request, _smallest(request, allocation))


def least(request: Request, allocation: Allocation) -> Plan:
    """The same before it is given what memory is left, which is quicker to find and fits in the same cases."""
    return _bare(request, _smallest(request, allocation))


def _smallest(request: Request, allocation: Allocation) -> Workload:
    *_, last = _candidates(request, allocation)
    return last


def _bare(request: Request, candidate: Workload) -> Plan:
    """A candidate with nothing given to statistics, evaluation or resident blocks that it could do without."""
    return Plan(request, candidate, candidate.allocation, phases(candidate), {})


def _made(request: Request, candidate: Workload) -> Plan:
    """The plan of a candidate: what depends on the memory that is left is filled in."""
    work = _with_resident_blocks(candidate, request)
    work = _with_eval_tokens(_with_group_bytes(work, request), request)
    return Plan(request, work, work.allocation, phases(work), _reasons(request, work))


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


def _candidates(request: Request, allocation: Allocation) -> Iterator[Workload]:
    """Workloads from the fastest to the smallest: every way with a busy device, then the smallest with less."""
    first = _first(request, allocation)
    ways = _levers(request)
    for way in ways:
        yield from _sized(request, first, way, down_to_one_row=False)
    resident = [way for way in ways if way.checkpointing and not way.base]
    for way in dict.fromkeys([*resident[-1:], ways[-1]]):
        if way.checkpointing or request.train.checkpointing == "off":
            yield from _sized(request, first, way, down_to_one_row=True)


def _sized(request: Request, first: Workload, way: _Lever, *, down_to_one_row: bool) -> Iterator[Workload]:
    for tokens in _token_ladder(request, first.length, down_to_one_row=down_to_one_row):
        for chunk in LOSS_CHUNKS:
            yield dataclasses.replace(
                first,
                checkpointing=way.checkpointing,
                offload_activations=way.activations,
                resident_blocks=0 if way.base else None,
                base_on_disk=way.base and parse_offload(request.train.offload).disk is not None,
                tokens=tokens,
                loss_chunk_tokens=min(chunk, tokens),
            )


def _first(request: Request, allocation: Allocation) -> Workload:
    train, dims = request.train, request.shape.dims
    seq_len = request.data.seq_len or DEFAULT_SEQ_LEN
    length = min(seq_len, request.longest_row or seq_len)
    fixed = train.micro_batch != "auto"
    return Workload(
        shape=request.shape,
        allocation=allocation,
        device=request.device,
        attention=_attention(request.device, length, capped=bool(dims.attention_softcap)),
        optimizer=train.optimizer,
        dropout=request.adapter.dropout if allocation.low_rank_parameters else 0.0,
        mask_score=request.masks.mask_score,
        mask_scope=request.masks.mask_scope,
        length=length,
        rows=min(int(train.micro_batch), train.batch_size) if fixed else train.batch_size,
        tokens=length,
        eval_tokens=length,
        checkpointing=False,
        loss_chunk_tokens=LOSS_CHUNKS[0],
        mask_group_bytes=0,
        checkpoints=train.keep,
    )


def _attention(device: str, length: int, *, capped: bool) -> str:
    """``eager`` where scores are capped, which fused kernels cannot do, and for short rows on a CPU; else ``sdpa``."""
    return "eager" if capped or (device == "cpu" and length <= EAGER_TOKENS) else "sdpa"


def _token_ladder(request: Request, length: int, *, down_to_one_row: bool) -> list[int]:
    """Sizes of a micro-batch in tokens, falling; a fixed micro-batch has one."""
    train = request.train
    if train.micro_batch != "auto":
        return [min(int(train.micro_batch), train.batch_size) * length]
    tokens = max(length, min(WANTED_TOKENS[request.device], train.batch_size * length))
    floor = length if down_to_one_row else max(length, min(tokens, BUSY_TOKENS[request.device]))
    ladder = [tokens]
    while ladder[-1] > floor:
        ladder.append(max(floor, ladder[-1] // 2))
    return ladder


def _with_resident_blocks(work: Workload, request: Request) -> Workload:
    """Keep as many decoder blocks of a streamed base on the device as there is room for."""
    if not work.streamed:
        return work
    memory = phases(dataclasses.replace(work, mask_group_bytes=0))
    room = request.cap - max(phase.device_total for phase in memory.values())
    blocks = max(0, min(room // parts.block_bytes(work.shape), work.shape.dims.layers))
    return dataclasses.replace(work, resident_blocks=int(blocks))


def _with_group_bytes(work: Workload, request: Request) -> Workload:
    """Give mask statistics the memory that their phase leaves, within ``--mask-memory``, at least one matrix."""
    if not work.allocation.nnz_total or work.mask_score not in GRADIENT_SCORES:
        return work
    sizes = parts.observed(work.allocation, work.mask_scope)
    least, most = (4 * function(sizes.values()) for function in (max, sum))
    alone = dataclasses.replace(work, mask_group_bytes=least)
    memory = phases(alone)["select"]
    taken = memory.device_total - memory.device["mask_statistics"] + (memory.host_total if work.on_cpu else 0)
    room = int(STATISTICS_SHARE * (request.cap - taken))
    if request.masks.mask_memory is not None:
        room = min(room, parse_size(request.masks.mask_memory, "--mask-memory"))
    return dataclasses.replace(work, mask_group_bytes=max(least, min(most, room)))


def _with_eval_tokens(work: Workload, request: Request) -> Workload:
    """The largest evaluation micro-batch that fits."""
    tokens = max(work.length, EVAL_TOKENS)
    while tokens > work.length:
        memory = phases(dataclasses.replace(work, eval_tokens=tokens))["eval"]
        if memory.device_total + (memory.host_total if work.on_cpu else 0) <= request.cap:
            break
        tokens = max(work.length, tokens // 2)
    return dataclasses.replace(work, eval_tokens=tokens)


def _reasons(request: Request, work: Workload) -> dict[str, str]:
    """Why each setting is what it is."""
    train = request.train
    known = request.longest_row is not None
    reasons = {
        "longest_row": "the longest row of the data" if known else "rows are taken to fill seq-len; --data would tell",
        "micro_batch": "as asked" if train.micro_batch != "auto" else "bounded by tokens, not by rows",
        "micro_batch_tokens": _token_reason(request, work),
        "checkpointing": _checkpointing_reason(request, work),
        "offload": _offload_reason(request, work),
        "attention": _attention_reason(work),
        "loss_chunk_tokens": f"logits of {work.loss_chunk_tokens} positions exist at once",
    }
    if work.mask_group_bytes:
        reasons["mask_group_bytes"] = f"{size_text(work.mask_group_bytes)} of statistics at a time"
    return reasons


def _token_reason(request: Request, work: Workload) -> str:
    if request.train.micro_batch != "auto":
        return f"{work.rows} rows of {work.length} tokens, as asked"
    if work.tokens >= WANTED_TOKENS[work.device]:
        return "more tokens at once gain nothing on this device"
    if work.tokens == work.length * request.train.batch_size:
        return "the whole batch at once"
    return "the most that fits" if work.tokens > work.length else "one longest row at a time"


def _checkpointing_reason(request: Request, work: Workload) -> str:
    if request.train.checkpointing != "auto":
        return "as asked"
    if work.checkpointing:
        return "activations do not fit; recomputing them costs about a third more time"
    return "all activations fit, so nothing is recomputed"


def _offload_reason(request: Request, work: Workload) -> str:
    if request.train.offload != "auto":
        return "as asked"
    if not work.offload_activations:
        return "everything fits without" if not work.on_cpu else "device and host are one memory"
    if not work.streamed:
        return "boundary activations move to the host; the copies overlap with the arithmetic"
    return f"the base does not fit beside the rest: {work.resident_blocks} of its blocks stay, the others are streamed"


def _attention_reason(work: Workload) -> str:
    if work.shape.dims.attention_softcap:
        return "fused attention cannot cap scores"
    if work.attention == "eager":
        return f"faster in backward on a CPU, up to rows of {EAGER_TOKENS} tokens"
    return "fused, without a score matrix"
