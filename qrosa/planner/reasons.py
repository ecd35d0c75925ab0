"""Why each setting of a plan is what it is, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qrosa.masks.passes import STATISTIC_BYTES
from qrosa.planner.bytes.components import observed
from qrosa.planner.bytes.zero import drive_bytes, offload_seconds, resident_bytes
from qrosa.planner.plan import Choice, Plan
from qrosa.planner.request import Request
from qrosa.planner.search.candidates import EAGER_TOKENS, WANTED_TOKENS
from qrosa.planner.search.packing import padding, why_padded
from qrosa.planner.search.solve import solve
from qrosa.planner.time.cost import BANDWIDTH_SHARE
from qrosa.planner.workload import Workload
from qrosa.quantities import bytes_text


def reasons(plan: Plan) -> dict[str, str]:
    """Setting -> why it is what it is."""
    request, work, choice = plan.request, plan.work, plan.choice
    train = request.train
    known = request.rows.longest is not None
    found = {
        "longest_row": "the longest row of the data" if known else "rows are taken to fill seq-len; --data would tell",
        "micro_batch": "as asked" if train.micro_batch != "auto" else "bounded by tokens, not by rows",
        "micro_batch_tokens": _token_reason(request, work),
        "packing": _packing_reason(plan),
        "checkpointing": _checkpointing_reason(request, work, choice),
        "offload": _offload_reason(request, work, choice),
        "attention": _attention_reason(work),
        "loss_chunk_tokens": f"logits of {work.loss_chunk_tokens} positions exist at once",
    }
    if train.goal.group == 2:
        found["batch_size"] = "pairs, which are two rows each"
    optimizer = optimizer_reason(request, work)
    if optimizer is not None:
        found["deepspeed"] = optimizer
    if work.mask_candidates:
        found["mask_selection"] = _streaming_reason(request, work)
    elif work.mask_group_bytes:
        found["mask_group_bytes"] = f"{bytes_text(work.mask_group_bytes)} of statistics at a time"
    return found


def _streaming_reason(request: Request, work: Workload) -> str:
    whole = STATISTIC_BYTES * sum(observed(work.allocation, work.mask_scope).values())
    why = "as asked" if request.masks.mask_selection else f"exact statistics take {bytes_text(whole)}"
    return f"{why}; in one pass, sums are kept at {work.mask_candidates} candidates for each position of the mask"


def _token_reason(request: Request, work: Workload) -> str:
    if request.train.micro_batch != "auto":
        return f"{work.rows} rows of {work.length} tokens, as asked"
    if work.tokens >= WANTED_TOKENS[work.device]:
        return "more tokens at once gain nothing on this device"
    if work.tokens == work.length * request.train.step_rows:
        return "the whole batch at once"
    return "the most that fits" if work.tokens > work.length else "one longest row at a time"


def _packing_reason(plan: Plan) -> str:
    if not plan.work.packed:
        return (
            why_padded(plan) or f"{padding(plan):.1%} of the tokens are padding; turned off, or packed rows do not fit"
        )
    if not plan.request.rows.steps:
        return "rows end to end, each with its own attention"
    return f"rows end to end; padded, {padding(plan):.1%} of the tokens would be padding"


def _passed_over(choice: Choice | None, pulled: Callable[[Workload], bool]) -> str | None:
    """The best of the settings that fit without a lever, where the lever was pulled all the same; in words."""
    without = [timed for timed in choice.among if not pulled(timed.work)] if choice else []
    if choice is None or not without:
        return None
    best = min(without, key=lambda timed: timed.seconds)
    return (
        f"faster than {best.work.tokens} tokens at once without: {choice.chosen.seconds:.2g} s a step against "
        f"{best.seconds:.2g}, estimated on {choice.card}"
    )


def _checkpointing_reason(request: Request, work: Workload, choice: Choice | None) -> str:
    if request.train.checkpointing != "auto":
        return "as asked"
    if work.checkpointing:
        passed_over = _passed_over(choice, lambda other: other.checkpointing)
        if passed_over:
            return passed_over
        return "activations do not fit; recomputing them costs about a third more time"
    return "all activations fit, so nothing is recomputed"


def _offload_reason(request: Request, work: Workload, choice: Choice | None) -> str:
    if request.train.offload != "auto":
        return "as asked"
    if not work.offload_activations:
        return "everything fits without" if not work.on_cpu else "device and host are one memory"
    passed_over = _passed_over(choice, lambda other: other.offload_activations or other.streamed)
    if passed_over:
        return passed_over
    if not work.streamed:
        return "boundary activations move to the host; the copies overlap with the arithmetic"
    return f"the base does not fit beside the rest: {work.resident_blocks} of its blocks stay, the others are streamed"


def _attention_reason(work: Workload) -> str:
    if work.shape.dims.attention_softcap:
        return "fused attention cannot cap scores"
    if work.attention == "eager":
        return f"faster in backward on a CPU, up to rows of {EAGER_TOKENS} tokens"
    return "fused, without a score matrix"


LINK_RATE = 12e9


def optimizer_reason(request: Request, work: Workload) -> str | None:
    """Whether optimizer offload pays, in words; None where there is none."""
    if work.zero is None or work.zero.offload is None:
        return None
    if work.on_cpu and work.zero.offload == "cpu":
        return "loses: device and host are one memory, so nothing is saved"

    stays = dataclasses.replace(work.zero, offload=None)
    without = solve(dataclasses.replace(request, zero=stays), work.allocation)
    low, high = work.allocation.low_rank_parameters, work.allocation.sparse_parameters
    kept, moved = (sum(resident_bytes(one, low, high).values()) for one in (without.work, work))
    cost = f"{_seconds(request, work):.2f} s a step"
    if work.zero.offload == "nvme":
        cost += f", the drive's time, and {bytes_text(drive_bytes(work))} on it"
    if kept <= moved:
        return f"loses: its buckets take {bytes_text(moved - kept)} more than it frees, for {cost}"
    if without.fits and _same_settings(without, work):
        return f"loses: the same settings fit without; it frees {bytes_text(kept - moved)} for {cost}"
    return f"frees {bytes_text(kept - moved)} of the card for {cost}; without it {_otherwise(without, work)}"


def _seconds(request: Request, work: Workload) -> float:
    card = request.machines.card if request.machines is not None else None
    return offload_seconds(work, card.link if card else LINK_RATE, BANDWIDTH_SHARE * card.bandwidth if card else 0.0)


_SETTINGS = ("tokens", "rows", "checkpointing", "offload_activations", "resident_blocks", "loss_chunk_tokens")


def _same_settings(without: Plan, work: Workload) -> bool:
    return all(getattr(without.work, name) == getattr(work, name) for name in _SETTINGS)


def _otherwise(without: Plan, work: Workload) -> str:
    if not without.fits:
        return "nothing fits"
    if without.work.tokens != work.tokens:
        return f"micro-batches have {without.work.tokens} tokens"
    return "more is recomputed or moved to the host"
