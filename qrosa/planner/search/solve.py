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
from qrosa.planner.bytes import components as parts
from qrosa.planner.bytes.phases import phases
from qrosa.planner.cards import LARGEST, Machines, smallest_card
from qrosa.planner.plan import Choice, Plan, Timed
from qrosa.planner.request import Request
from qrosa.planner.search.candidates import candidates
from qrosa.planner.time.estimate import estimate
from qrosa.planner.workload import GRADIENT_SCORES, Workload
from qrosa.quantities import parse_size

EVAL_TOKENS = 4096
TIE = 1.05  # estimates closer than this say nothing
STATISTICS_SHARE = 0.9  # of the memory that selection leaves: one more pass is cheaper than running out


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
    """The plan that takes least memory, what is left over not given out; quicker, and it fits in the same cases."""
    return _bare(request, _smallest(request, allocation))


def _smallest(request: Request, allocation: Allocation) -> Workload:
    *_, last = candidates(request, allocation)
    return last


def _bare(request: Request, candidate: Workload) -> Plan:
    """A candidate with nothing given to statistics, evaluation or resident blocks that it could do without."""
    return Plan(request, candidate, candidate.allocation, phases(candidate))


def _made(request: Request, candidate: Workload, choice: Choice | None = None) -> Plan:
    """The plan of a candidate: what depends on the memory that is left is filled in."""
    work = _with_resident_blocks(candidate, request)
    work = _with_eval_tokens(_with_group_bytes(work, request), request)
    return Plan(request, work, work.allocation, phases(work), choice)


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
