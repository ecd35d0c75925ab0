"""From a memory cap to settings: the fastest candidate that fits.

``candidates`` lists the settings in the order in which the levers usually pay. On a CPU the first that fits is taken.
On a card the estimated time of a step (``estimate``) decides between those that fit, say between recomputation with a
busy micro-batch and a smaller one without; the order decides where estimates are too close to tell. Mask statistics
take what memory is left in their own phase: all of it exactly in one pass, or else as many streamed candidates as fit.

Checking a candidate is arithmetic, so all of them together cost milliseconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qrosa.adapters.budget import Allocation, allocate
from qrosa.masks.passes import STATISTIC_BYTES
from qrosa.masks.sizes import CANDIDATE_FACTOR, LEAST_CANDIDATES, MOST_CANDIDATES
from qrosa.planner.bytes import components as parts
from qrosa.planner.bytes.peaks import allocator_share
from qrosa.planner.bytes.phases import phases, selection
from qrosa.planner.cards import LARGEST, Machines, smallest_card
from qrosa.planner.plan import Choice, Plan, Timed
from qrosa.planner.request import Request
from qrosa.planner.search.candidates import candidates
from qrosa.planner.search.packing import why_padded, with_packing
from qrosa.planner.time.estimate import estimate
from qrosa.planner.workload import Workload
from qrosa.quantities import parse_size

EVAL_TOKENS = 4096
TIE = 1.05  # estimates closer than this say nothing
STATISTICS_SHARE = 0.9  # of the memory that selection leaves: one more pass is cheaper than running out


def solve(request: Request, allocation: Allocation | None = None) -> Plan:
    """Choose the settings of a request whose device and cap are known: the fastest that fit, else the smallest.

    Rows are packed where that was left open and padding would be much of the work.
    """
    if request.train.packing != "auto":
        return _solve(request, allocation)
    padded = _solve(with_packing(request, "off"), allocation)
    if why_padded(padded) is not None:
        return padded
    packed = _solve(with_packing(request, "on"), allocation)
    return packed if packed.fits else padded


def _solve(request: Request, allocation: Allocation | None) -> Plan:
    allocation = allocation or allocate(request.adapter, request.shape.linears, request.shape.base_parameters)
    if request.device == "cuda":
        ranked = _fastest_first(request, allocation)
    else:
        ranked = [(work, None) for work in candidates(request, allocation) if _bare(request, work).fits]
    second: Plan | None = None
    for candidate, choice in ranked:
        made = _made(request, candidate, choice)
        if made.fits and made.mask_passes <= 1:
            return made
        second = second or (made if made.fits else None)  # selection in many passes may take longer than training
    return second or _made(request, _smallest(request, allocation))


def _fastest_first(request: Request, allocation: Allocation) -> list[tuple[Workload, Choice | None]]:
    """What fits, the fastest first, and what each was chosen over; of near ties the one that is tried first.

    Of candidates with micro-batches of one size, the first that fits stands for all: each lever costs time.
    """
    found: dict[tuple[int, int], Workload] = {}
    for work in candidates(request, allocation):
        size = work.rows, work.tokens
        if size not in found and _bare(request, work).fits:
            found[size] = work
    fitting = list(found.values())
    if len(fitting) < 2:
        return [(work, None) for work in fitting]
    card = request.machines.card if request.machines else smallest_card(request.cap, as_sold=True) or LARGEST
    batch = request.train.step_rows
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
    work = _with_eval_tokens(_with_selection(work, request), request)
    return Plan(request, work, work.allocation, phases(work), choice)


def _with_resident_blocks(work: Workload, request: Request) -> Workload:
    """Keep as many decoder blocks of a streamed base on the device as there is room for, selection provided for."""
    if not work.streamed:
        return work
    selecting = _streaming(work, request, most=CANDIDATE_FACTOR) if _may_stream(work, request) else work
    memory = phases(dataclasses.replace(selecting, mask_group_bytes=0))
    room = request.cap - max(phase.device_total for phase in memory.values())
    each = (1 + allocator_share(work.checkpointing)) * parts.block_bytes(work.shape)
    blocks = max(0, min(room // each, work.shape.dims.layers))
    return dataclasses.replace(work, resident_blocks=int(blocks))


def _with_selection(work: Workload, request: Request) -> Workload:
    """How mask statistics are collected: exactly if one pass does, streamed if there is room, else in more passes."""
    if not work.selects_by_gradients:
        return work
    exact = _with_group_bytes(work, request)
    sizes = parts.observed(work.allocation, work.mask_scope)
    one_pass = STATISTIC_BYTES * sum(sizes.values()) <= exact.mask_group_bytes
    if not _may_stream(work, request) or (one_pass and request.masks.mask_selection is None):
        return exact
    streamed = _streaming(work, request, most=MOST_CANDIDATES)
    return streamed if streamed.mask_candidates else exact


def _may_stream(work: Workload, request: Request) -> bool:
    return work.selects_by_gradients and request.masks.mask_selection != "exact"


def _streaming(work: Workload, request: Request, most: int) -> Workload:
    """Streamed statistics with as many candidates as there is room for, up to ``most`` for each position of the mask.

    Unchanged where not even the fewest fit, which settings that are asked to stream already have.
    """
    memory = request.masks.mask_memory
    bound = request.cap if memory is None else parse_size(memory, "--mask-memory")

    def fits(factor: int) -> bool:
        sized = dataclasses.replace(work, mask_candidates=factor)
        wanted = parts.candidate_bytes(sized)
        return wanted <= min(bound, STATISTICS_SHARE * (request.cap - _beside_statistics(sized)))

    below = LEAST_CANDIDATES - 1
    found = most if fits(most) else below + last(lambda factor: fits(below + factor), most - below)
    return dataclasses.replace(work, mask_candidates=found) if found > below else work


def _beside_statistics(work: Workload) -> int:
    """Bytes of selection without its statistics, of the memory that is capped."""
    memory = selection(work)
    taken = memory.device_total + (memory.host_total if work.on_cpu else 0)
    return taken - memory.device.get("mask_statistics", 0)


def last(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, 0 where 1 does not; doubling first, since small ones are cheap."""
    high = 1
    while high <= most and fits(high):
        high *= 2
    low, high = high // 2, min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with_group_bytes(work: Workload, request: Request) -> Workload:
    """Give exact statistics the memory that their phase leaves, within ``--mask-memory``, at least one matrix."""
    sizes = parts.observed(work.allocation, work.mask_scope)
    least, most = (STATISTIC_BYTES * function(sizes.values()) for function in (max, sum))
    alone = dataclasses.replace(work, mask_candidates=0, mask_group_bytes=least)
    room = int(STATISTICS_SHARE * (request.cap - _beside_statistics(alone)))
    if request.masks.mask_memory is not None:
        room = min(room, parse_size(request.masks.mask_memory, "--mask-memory"))
    return dataclasses.replace(alone, mask_group_bytes=max(least, min(most, room)))


def _with_eval_tokens(work: Workload, request: Request) -> Workload:
    """The largest evaluation micro-batch that fits."""
    tokens = max(work.length, EVAL_TOKENS)
    while tokens > work.length:
        memory = phases(dataclasses.replace(work, eval_tokens=tokens))["eval"]
        if memory.device_total + (memory.host_total if work.on_cpu else 0) <= request.cap:
            break
        tokens = max(work.length, tokens // 2)
    return dataclasses.replace(work, eval_tokens=tokens)
