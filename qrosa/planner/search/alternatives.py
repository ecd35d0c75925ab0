"""The settings nearest to a plan that does not fit, one change at a time, each tried before it is named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qrosa.adapters.budget import allocate
from qrosa.errors import DoesNotFitError, InputError
from qrosa.optim.kinds import OPTIMIZERS, leanest
from qrosa.planner.plan import Plan
from qrosa.planner.request import Request
from qrosa.planner.search.packing import may_pack
from qrosa.planner.search.solve import solve_smallest
from qrosa.quantities import bytes_text, optimizer_parts, parse_offload, parse_size

_LENGTH_STEP = 64
_GB_TENTH = 2**30 / 10


@dataclass(frozen=True)
class Suggestion:
    """A change that makes a plan fit.

    Attributes:
        setting: Name of the setting, with underscores.
        value: What to set it to.
        peak: Bytes that the plan then takes at most.
    """

    setting: str
    value: str
    peak: int

    def __str__(self) -> str:
        return f"--{self.setting.replace('_', '-')} {self.value}"


def require_fit(plan: Plan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        DoesNotFitError: It does not; the hint names the nearest settings that do.
    """
    if plan.fits:
        return
    ways = alternatives(plan)
    phase, peak, cap, what = plan.tightest
    raise DoesNotFitError(
        f"{phase} needs at least {bytes_text(peak)} of {what}; {bytes_text(cap)} is available",
        "these would fit: " + ", or ".join(str(way) for way in ways) if ways else "use a smaller model",
    )


def alternatives(plan: Plan) -> list[Suggestion]:
    """Single changes that make ``plan`` fit, the least painful first; empty where it fits as it is.

    Undoing a forced micro-batch, checkpointing or offload comes first, then 8-bit optimizer states, packing, shorter
    rows, a smaller budget, a base that is mapped from files, and more memory, which always helps.
    """
    return [] if plan.fits else [suggestion for suggestion in _tries(plan) if suggestion is not None]


def _tries(plan: Plan) -> Iterator[Suggestion | None]:
    request = plan.request
    train = request.train
    freed = {
        "micro_batch": "auto",
        "checkpointing": "auto",
        "offload": ",".join(["auto", *optimizer_parts(train.offload)]),
    }
    if not OPTIMIZERS[train.optimizer].paged and request.zero is None:  # DeepSpeed runs one optimizer only
        freed["optimizer"] = leanest().name
    if may_pack(request):
        freed["packing"] = "on"
    for name, free in freed.items():
        if getattr(train, name) != free:
            change: dict[str, Any] = {name: free}
            changed = dataclasses.replace(request, train=dataclasses.replace(train, **change))
            yield _if_fits(changed, name, free)
    yield _longest(request, plan.work.length)
    yield _smaller_budget(request)
    yield _on_disk(plan)
    if not plan.fits_host and plan.fits_pinned:
        yield _more("host_memory", plan.host_peak * request.sharing)
    yield _larger_card(plan)


def _on_disk(plan: Plan) -> Suggestion | None:
    """A streamed base mapped from files, where it is the host that is too small."""
    if plan.fits_host or not plan.work.streamed or plan.work.base_on_disk:
        return None
    value = ",".join("base=disk:FOLDER" if part == "base" else part for part in plan.offload.split(","))
    train = dataclasses.replace(plan.request.train, offload=value)
    return _if_fits(dataclasses.replace(plan.request, train=train), "offload", value)


def _larger_card(plan: Plan) -> Suggestion | None:
    """The smallest card that would do; where the host is too small, one that needs less of it."""
    sharing = plan.request.sharing
    host_memory = plan.request.train.host_memory
    if plan.work.on_cpu and host_memory is not None and parse_size(host_memory, "--host-memory") < plan.peak * sharing:
        return _more("host_memory", plan.peak * sharing)
    if plan.fits_host:
        return _more("vram", plan.peak)
    asked = parse_offload(plan.request.train.offload)
    if asked.activations or asked.base:  # which stay on the host, whatever the card
        return None
    train = dataclasses.replace(
        plan.request.train, offload=",".join(optimizer_parts(plan.request.train.offload)) or "none"
    )
    resident = solve_smallest(dataclasses.replace(plan.request, train=train))
    return _more("vram", resident.peak) if resident.fits_host else None


def _more(name: str, needed: int) -> Suggestion:
    """More memory of a kind, in tenths of a gigabyte."""
    return Suggestion(name, f"{math.ceil(needed / _GB_TENTH) / 10:g}GB", needed)


def _if_fits(request: Request, name: str, value: str) -> Suggestion | None:
    try:
        tried = solve_smallest(request)
    except InputError:
        return None
    return Suggestion(name, value, tried.peak) if tried.fits else None


def _longest(request: Request, length: int) -> Suggestion | None:
    """The longest rows that fit, in steps of 64 tokens."""

    def attempt(steps: int) -> Suggestion | None:
        seq_len = steps * _LENGTH_STEP
        data = dataclasses.replace(request.data, seq_len=seq_len)
        return _if_fits(dataclasses.replace(request, data=data), "seq_len", str(seq_len))

    return _largest(attempt, (length - 1) // _LENGTH_STEP)


def _smaller_budget(request: Request) -> Suggestion | None:
    """The largest share of the budget, in tenths, that fits."""
    if request.adapter.budget is None:
        return None
    trainable = allocate(request.adapter, request.shape.linears, request.shape.base_parameters).trainable

    def attempt(tenths: int) -> Suggestion | None:
        count = trainable * tenths // 10
        if count < 1:
            return None
        adapter = dataclasses.replace(request.adapter, budget=str(count))
        return _if_fits(dataclasses.replace(request, adapter=adapter), "budget", str(count))

    return _largest(attempt, 9)


def _largest(attempt: Callable[[int], Suggestion | None], most: int) -> Suggestion | None:
    """What ``attempt`` gives for the largest number from 1 to ``most`` that succeeds, by bisection."""
    found, low, high = None, 1, most
    while low <= high:
        middle = (low + high) // 2
        tried = attempt(middle)
        if tried is None:
            high = middle - 1
        else:
            found, low = tried, middle + 1
    return found
