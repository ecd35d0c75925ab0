"""What if: how far the card reaches with each way to hold activations and base, and how small a card would do.

Each row forces one combination of levers and asks three questions of the closed form, by bisection: the longest rows
(one at a time, where the micro-batch is left open), the most rows of the chosen length in a micro-batch, and the least
memory for the chosen length. Each answer holds with everything else as asked, and one step more does not fit. The
settings that take least memory are what is tried; what would be left over makes evaluation or streaming faster, not
smaller. A row costs some thirty evaluations of a millisecond.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrosa.adapters.budget import Allocation
from qrosa.planner.cards import smallest_card
from qrosa.planner.plan import Plan
from qrosa.planner.request import Request
from qrosa.planner.search.solve import last, least, solve
from qrosa.planner.time.estimate import Estimate, estimate
from qrosa.quantities import parse_offload

if TYPE_CHECKING:
    pass

LENGTH_STEP = 64
MEMORY_STEP = 2**30 / 10  # as --vram would be written
_MOST_TOKENS = 1 << 20  # of a micro-batch, where the search for the largest one ends


@dataclass(frozen=True)
class WhatIf:
    """One way to hold activations and base.

    Attributes:
        checkpointing: Activations are recomputed.
        offload: What is kept on the host, as ``--offload`` would ask for it.
        planned: The plan does this.
        longest_seq_len: Longest rows that fit, in steps of 64 tokens or the model's own limit; None where none do.
        largest_micro_batch: Most rows of the planned length; None where not even one fits.
        smallest_card: Bytes of memory that the planned length needs, in steps of a tenth of a gigabyte.
        host: Bytes of host memory beside the card while training at the planned length.
        step_seconds: Of a step with the fastest settings that fit, estimated; None without a card, or where none fit.
        tokens_per_s: The same.
    """

    checkpointing: bool
    offload: str
    planned: bool
    longest_seq_len: int | None
    largest_micro_batch: int | None
    smallest_card: int
    host: int
    step_seconds: float | None
    tokens_per_s: float | None

    @property
    def words(self) -> str:
        """The levers in a few words."""
        if self.offload == "none":
            return "recompute" if self.checkpointing else "no lever"
        moved = ["activations" if part == "activations" else "base" for part in self.offload.split(",")]
        return f"recompute, {' and '.join(moved)} on host"

    def to_json(self) -> dict[str, Any]:
        """An entry of the plan document's ``what_if``."""
        card = smallest_card(self.smallest_card)
        return dataclasses.asdict(self) | {"smallest_card_name": card.name if card else None}


def what_if(plan: Plan) -> list[WhatIf]:
    """A row for each combination of levers that the device has, from the fastest to the smallest."""
    combinations = [("off", "none"), ("on", "none")]
    if not plan.work.on_cpu:  # there, device and host are one memory
        disk = parse_offload(plan.request.train.offload).disk
        base = f"base=disk:{disk}" if disk else "base"
        combinations += [("on", "activations"), ("on", f"activations,{base}"), ("on", base)]
    return [_row(plan, checkpointing, offload) for checkpointing, offload in combinations]


def _row(plan: Plan, checkpointing: str, offload: str) -> WhatIf:
    train = dataclasses.replace(plan.request.train, checkpointing=checkpointing, offload=offload)
    request, allocation = dataclasses.replace(plan.request, train=train), plan.allocation
    smallest = least(request, allocation)
    estimated = _estimate(request, allocation) if smallest.fits else None
    return WhatIf(
        checkpointing=checkpointing == "on",
        offload=offload,
        planned=plan.work.checkpointing == (checkpointing == "on") and plan.layer_offload == offload,
        longest_seq_len=longest_row(request, allocation),
        largest_micro_batch=_largest(request, allocation, plan.work.length),
        smallest_card=int(math.ceil(smallest.peak / MEMORY_STEP) * MEMORY_STEP),
        host=smallest.phases["train"].host_total,
        step_seconds=estimated.step_seconds if estimated else None,
        tokens_per_s=estimated.tokens_per_second if estimated else None,
    )


def longest_row(request: Request, allocation: Allocation) -> int | None:
    """The longest rows that fit, whatever the rows of the data are."""
    limit = request.shape.dims.max_positions

    def fits(steps: int) -> bool:
        data = dataclasses.replace(request.data, seq_len=min(steps * LENGTH_STEP, limit))
        rows = dataclasses.replace(request.rows, longest=None, most=())
        return least(dataclasses.replace(request, data=data, rows=rows), allocation).fits

    steps = last(fits, -(-limit // LENGTH_STEP))
    return min(steps * LENGTH_STEP, limit) if steps else None


def _largest(request: Request, allocation: Allocation, length: int) -> int | None:
    """The most rows of ``length`` tokens that fit in a micro-batch."""

    def fits(rows: int) -> bool:
        train = dataclasses.replace(request.train, micro_batch=str(rows), batch_size=rows)
        of_length = dataclasses.replace(request.rows, most=())
        return least(dataclasses.replace(request, train=train, rows=of_length), allocation).fits

    return last(fits, max(1, _MOST_TOKENS // length)) or None


def _estimate(request: Request, allocation: Allocation) -> Estimate | None:
    """A step with the fastest settings that fit, where a card is named."""
    if request.machines is None:
        return None
    return estimate(solve(request, allocation).work, request.train.step_rows, request.machines)
