"""Hours of a whole run on a card that is not here: what each phase takes, from loading to the export.

Steps follow from the rows and ``--epochs``; rows are taken to be as long as they are on average, so this is the time of
the whole, where the estimate of a step is that of the longest rows. As rough as that one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qrosa.config import SPLITS
from qrosa.masks.sizes import DENSE_SAMPLES
from qrosa.optim.schedule import phases_of, steps_between_evaluations, steps_between_saves, steps_of
from qrosa.planner.bytes import components as parts
from qrosa.planner.cards import Card
from qrosa.planner.plan import Plan
from qrosa.planner.time.cost import BANDWIDTH_SHARE, Cost, passes
from qrosa.planner.time.estimate import DISK_RATE, LINK_SHARE, estimate, micro_batch_time
from qrosa.planner.workload import SAMPLE_TOKENS, Workload
from qrosa.quantities import parse_share

START = 15.0  # seconds until libraries are imported, a context is there and the rows are read: some, not counted
WRITE_RATE = 1e9  # bytes a second of an NVMe drive, writing through
QUANTISE_MOVED = 12  # bytes that a card moves to quantise a weight: 16 bits in, fp32 copies, codes out
MERGE_RATE = 40e6  # weights that one core of a server quantises, merges and rounds in a second (SmolLM2-135M: 36e6)


@dataclass(frozen=True)
class RunTime:
    """Seconds of a run, estimated.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens of all of them.
        seconds: Phase -> seconds, in order.
    """

    steps: int
    tokens: int
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """``run`` in the plan document's ``estimate``."""
        return {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds, "total_seconds": self.total}

    def describe(self) -> str:
        """One line."""
        spent = ", ".join(f"{name} {duration(took)}" for name, took in self.seconds.items() if took >= 1)
        return f"estimated for all {self.steps:,} steps, {self.tokens:,} tokens: {duration(self.total)} ({spent})"


def run_time(plan: Plan) -> RunTime | None:
    """The time of a whole run; None where no card is named or no rows are known."""
    machines, rows, train = plan.request.machines, plan.request.rows, plan.request.train
    if machines is None or not rows.count:
        return None
    work, card, masks = _typical(plan), machines.card, plan.request.masks
    held_out = round(_held_out(plan.request.data.eval_split) * rows.count)
    allocation = plan.allocation
    together = train.step_rows // train.batch_size
    steps = steps_of(train, (rows.count - held_out) // together)
    low, sparse = bool(allocation.low_rank_parameters), bool(allocation.sparse_parameters)
    phases = phases_of(steps, masks.warmup_steps, low_rank=low, sparse=sparse)
    step = estimate(work, train.step_rows, machines).step_seconds
    adapter = parts.low_rank_bytes(allocation) + parts.sparse_bytes(allocation)
    state = adapter + parts.optimizer_bytes(
        allocation.low_rank_parameters, allocation.sparse_parameters, train.optimizer
    )
    between = steps_between_evaluations(train, steps)
    evaluations = 1 + (steps // between if between else 0)
    saves = -(-steps // steps_between_saves(train, steps)) + (evaluations if train.keep_best else 0)
    seconds = {
        "load": START + _load_seconds(plan, card),
        "warmup": phases.warmup * step,
        "select": plan.mask_passes * masks.mask_samples * _sample_seconds(work, card, masks.mask_samples),
        "train": (steps - phases.warmup) * step,
        "eval": evaluations * held_out * together * _forward_seconds(work, card) / machines.cards
        + 2 * train.samples * _answer_seconds(work, card),
        "save": saves * state / WRITE_RATE,
        "export": plan.request.shape.base_parameters / MERGE_RATE,
    }
    return RunTime(steps, steps * train.step_rows * work.length, seconds)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _held_out(eval_split: str | None) -> float:
    """Share of the rows that is kept back for evaluation; rows of files of their own are not counted."""
    return 0.0 if eval_split is None or eval_split in SPLITS else parse_share(eval_split, "--eval-split")


def _typical(plan: Plan) -> Workload:
    """The settings with rows of average length, as many of them to a micro-batch as its tokens hold."""
    rows, work = plan.request.rows, plan.work
    length = max(1, min(work.length, round(rows.tokens / rows.count)))
    count = max(1, min(plan.request.train.step_rows, work.tokens // length))
    return dataclasses.replace(work, length=length, rows=count, tokens=count * length)


def _load_seconds(plan: Plan, card: Card) -> float:
    """Files read, one tensor after the other on its way to the card, where it is quantised if it is not yet."""
    shape = plan.request.shape
    packed = parts.base_bytes(shape) + parts.unquantised_bytes(shape)
    dense = shape.kind == "dense"
    stored = shape.stored_bytes * shape.base_parameters if dense else packed
    moved = QUANTISE_MOVED * shape.base_parameters if dense else 0
    return stored / min(DISK_RATE, LINK_SHARE * card.link) + Cost(moved=moved).seconds(card)


def _sample_seconds(work: Workload, card: Card, samples: int) -> float:
    """One row forward and backward, and what is made of its gradients: all of dY^T X, or only the kept positions."""
    row = dataclasses.replace(work, rows=1, tokens=work.length)
    whole = sum(linear.size for linear in work.shape.linears)
    dense = min(1.0, DENSE_SAMPLES / samples) if work.mask_candidates else 1.0
    looked = Cost(linear=2 * row.tokens * whole * dense, moved=8 * whole * dense)
    return micro_batch_time(row, card).total + looked.seconds(card)


def _answer_seconds(work: Workload, card: Card) -> float:
    """One prompt answered: a pass over it, then one over the base for every token."""
    base = parts.base_bytes(work.shape) + parts.unquantised_bytes(work.shape)
    blocks = 0 if work.resident_blocks is None else work.shape.dims.layers - work.resident_blocks
    token = base / (BANDWIDTH_SHARE * card.bandwidth)
    token += blocks * parts.block_bytes(work.shape) / (LINK_SHARE * card.link)
    return _forward_seconds(work, card) + SAMPLE_TOKENS * token


def _forward_seconds(work: Workload, card: Card) -> float:
    """One row, forward only."""
    row = dataclasses.replace(work, rows=1, tokens=work.length)
    found = passes(row)
    return (found.forward + dataclasses.replace(found.head, head=found.head.head / 2)).seconds(card)
