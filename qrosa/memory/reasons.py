"""Why each setting of a plan is what it is, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qrosa.memory.candidates import EAGER_TOKENS, WANTED_TOKENS
from qrosa.memory.deepspeed import optimizer_reason
from qrosa.memory.plan import Request, size_text
from qrosa.memory.workload import Workload


@dataclass(frozen=True)
class Timed:
    """Settings that fit, and the estimated seconds of a step with them."""

    work: Workload
    seconds: float


@dataclass(frozen=True)
class Choice:
    """What was chosen by its estimated time, and what it was chosen from.

    Attributes:
        card: Where the time was estimated.
        chosen: The settings that were taken.
        among: All that fit, in the order in which levers are pulled.
    """

    card: str
    chosen: Timed
    among: list[Timed]


def reasons(request: Request, work: Workload, choice: Choice | None = None) -> dict[str, str]:
    """Why each setting is what it is."""
    train = request.train
    known = request.longest_row is not None
    found = {
        "longest_row": "the longest row of the data" if known else "rows are taken to fill seq-len; --data would tell",
        "micro_batch": "as asked" if train.micro_batch != "auto" else "bounded by tokens, not by rows",
        "micro_batch_tokens": _token_reason(request, work),
        "checkpointing": _checkpointing_reason(request, work, choice),
        "offload": _offload_reason(request, work, choice),
        "attention": _attention_reason(work),
        "loss_chunk_tokens": f"logits of {work.loss_chunk_tokens} positions exist at once",
    }
    optimizer = optimizer_reason(request, work)
    if optimizer is not None:
        found["deepspeed"] = optimizer
    if work.mask_group_bytes:
        found["mask_group_bytes"] = f"{size_text(work.mask_group_bytes)} of statistics at a time"
    return found


def _token_reason(request: Request, work: Workload) -> str:
    if request.train.micro_batch != "auto":
        return f"{work.rows} rows of {work.length} tokens, as asked"
    if work.tokens >= WANTED_TOKENS[work.device]:
        return "more tokens at once gain nothing on this device"
    if work.tokens == work.length * request.train.batch_size:
        return "the whole batch at once"
    return "the most that fits" if work.tokens > work.length else "one longest row at a time"


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
