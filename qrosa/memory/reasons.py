"""Why each setting of a plan is what it is, in words."""

from __future__ import annotations

from qrosa.memory.candidates import EAGER_TOKENS, WANTED_TOKENS
from qrosa.memory.plan import Request, size_text
from qrosa.memory.workload import Workload


def reasons(request: Request, work: Workload) -> dict[str, str]:
    """Why each setting is what it is."""
    train = request.train
    known = request.longest_row is not None
    found = {
        "longest_row": "the longest row of the data" if known else "rows are taken to fill seq-len; --data would tell",
        "micro_batch": "as asked" if train.micro_batch != "auto" else "bounded by tokens, not by rows",
        "micro_batch_tokens": _token_reason(request, work),
        "checkpointing": _checkpointing_reason(request, work),
        "offload": _offload_reason(request, work),
        "attention": _attention_reason(work),
        "loss_chunk_tokens": f"logits of {work.loss_chunk_tokens} positions exist at once",
    }
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
