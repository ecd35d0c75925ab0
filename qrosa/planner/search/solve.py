"""From a memory cap to settings: the fastest candidate that fits.

``candidates`` lists the settings in the order in which the levers usually pay. On a CPU the first that fits is taken.
On a card the estimated time of a step (``estimate``) decides between those that fit, say between recomputation with a
busy micro-batch and a smaller one without; the order decides where estimates are too close to tell. Mask statistics
take most of what memory is left in their own phase: fewer bytes mean more passes, not other masks.

Checking a candidate is arithmetic, so all of them together cost milliseconds.
"""

from __future__ import annotations

import dataclasses

from qrosa.adapters.budget import Allocation, allocate
from qrosa.base.shape import ModelShape
from qrosa.config import AdapterConfig, DataConfig, MaskConfig, TrainConfig
from qrosa.errors import InputError
from qrosa.optim.zero.settings import zero_settings
from qrosa.planner.bytes import components as parts
from qrosa.planner.bytes.phases import phases
from qrosa.planner.cards import LARGEST, Machines, smallest_card
from qrosa.planner.hardware import card_memory, host_memory, processes_on_this_host
from qrosa.planner.plan import Choice, Plan, Timed
from qrosa.planner.reasons import reasons
from qrosa.planner.request import Request
from qrosa.planner.search.candidates import DEFAULT_SEQ_LEN, candidates
from qrosa.planner.time.estimate import estimate
from qrosa.planner.workload import GRADIENT_SCORES, Workload
from qrosa.quantities import parse_size

EVAL_TOKENS = 4096
TIE = 1.05  # estimates closer than this say nothing
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
    row_tokens: int = 0,
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
        row_tokens: Tokens of all rows, which lie encoded in host memory; 0 where no rows are known.

    Returns:
        The fastest settings that fit, or the smallest ones, with ``fits`` false.

    Raises:
        InputError: A model, a budget or a setting that cannot be.
    """
    shape = ModelShape.from_source(model) if isinstance(model, str) else model
    device, cap, host_cap = _device_and_caps(train, vram, device, machines)
    request = Request(
        shape,
        adapter,
        masks,
        dataclasses.replace(data, seq_len=_seq_len(data, shape)),
        train,
        device,
        cap,
        longest_row,
        machines,
        host_cap,
        row_tokens,
        zero_settings(train),
    )
    return solve(request, allocation)


def _device_and_caps(
    train: TrainConfig, vram: int | None, device: str | None, machines: Machines | None
) -> tuple[str, int, int | None]:
    """Where the run goes, the bytes that it may use there, and of host memory beside it (None: not known).

    Each card or process of a machine has its own of the first and a share of its host's memory.
    """
    if vram is None and train.vram is not None:
        vram = parse_size(train.vram, "--vram")
    if vram is None and machines is not None:
        vram = machines.card.memory
    card = card_memory()
    device = device or ("cuda" if vram is not None or card else "cpu")
    sharing = sharing_a_host(machines)
    asked = parse_size(train.host_memory, "--host-memory") // sharing if train.host_memory is not None else None
    if device == "cpu":
        caps = [cap for cap in (vram, asked) if cap is not None]
        return device, min(caps) if caps else host_memory() // sharing, None
    # A card that is not here stands in a host that is not here either.
    here = card is not None and machines is None
    return (
        device,
        vram or card or host_memory(),
        asked if asked is not None else host_memory() // sharing if here else None,
    )


def sharing_a_host(machines: Machines | None) -> int:
    """Processes that share a machine's memory: one for each of its cards."""
    return processes_on_this_host() if machines is None else machines.gpus


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
    if request.device == "cuda":
        ranked = _fastest_first(request, allocation)
    else:
        ranked = [(work, None) for work in candidates(request, allocation) if _bare(request, work).fits]
    for candidate, choice in ranked:
        made = _made(request, candidate, choice)
        if made.fits:
            return made
    return _made(request, _smallest(request, allocation))


def _fastest_first(request: Request, allocation: Allocation) -> list[tuple[Workload, Choice | None]]:
    """What fits, the fastest first, and what each was chosen over; of near ties the one that is tried first.

    Of candidates with micro-batches of one size, the first that fits stands for all: each lever costs time.
    """
    found: dict[int, Workload] = {}
    for work in candidates(request, allocation):
        if work.tokens not in found and _bare(request, work).fits:
            found[work.tokens] = work
    fitting = list(found.values())
    if len(fitting) < 2:
        return [(work, None) for work in fitting]
    card = request.machines.card if request.machines else smallest_card(request.cap) or LARGEST
    batch = request.train.batch_size
    timed = [
        Timed(work, estimate(_with_resident_blocks(work, request), batch, Machines(card)).step_seconds)
        for work in fitting
    ]
    close = TIE * min(each.seconds for each in timed)
    # Sorting keeps the order of equals: near ties stay as they are tried.
    ranked = sorted(timed, key=lambda each: max(each.seconds, close))
    return [(each.work, Choice(card.name, each, timed)) for each in ranked]


def solve_smallest(request: Request) -> Plan:
    """The settings that take least memory, whether or not larger ones would fit."""
    allocation = allocate(request.adapter, request.shape.linears, request.shape.base_parameters)
    return _made(request, _smallest(request, allocation))


def least(request: Request, allocation: Allocation) -> Plan:
    """The same before it is given what memory is left, which is quicker to find and fits in the same cases."""
    return _bare(request, _smallest(request, allocation))


def _smallest(request: Request, allocation: Allocation) -> Workload:
    *_, last = candidates(request, allocation)
    return last


def _bare(request: Request, candidate: Workload) -> Plan:
    """A candidate with nothing given to statistics, evaluation or resident blocks that it could do without."""
    return Plan(request, candidate, candidate.allocation, phases(candidate), {})


def _made(request: Request, candidate: Workload, choice: Choice | None = None) -> Plan:
    """The plan of a candidate: what depends on the memory that is left is filled in."""
    work = _with_resident_blocks(candidate, request)
    work = _with_eval_tokens(_with_group_bytes(work, request), request)
    return Plan(request, work, work.allocation, phases(work), reasons(request, work, choice))


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
    taken = memory.device_total - memory.device.get("mask_statistics", 0) + (memory.host_total if work.on_cpu else 0)
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
