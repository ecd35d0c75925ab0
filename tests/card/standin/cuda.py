"""torch.cuda's streams, events and questions to the driver, and how torch makes and moves tensors, for a stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qrosa.planner import hardware
from tests.card.standin.device import StandIn

CARD, NAME = torch.device("cuda", 0), "Stand-in"
MAKERS = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "linspace", "rand", "randn", "randint", "randperm", "eye"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "as_tensor", "empty_strided"),
)
NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


def _place_of(device: Any) -> str | None:
    """``card`` or ``host``, None where no device is said or it is another."""
    if device is None:
        return None
    kind = torch.device(device).type if not isinstance(device, int) else "cuda"
    return {"cuda": "card", "cpu": "host"}.get(kind)


def install(card: StandIn, patch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where torch's CUDA calls are; undone with ``patch``."""
    # torch keeps the list of functions that ``with torch.device(...)`` looks out for: it must be of the real ones.
    torch.utils._device._device_constructors()
    _install_streams(card, patch)
    _install_driver(card, patch)
    _install_makers(card, patch)
    _install_methods(card, patch)


def _install_streams(card: StandIn, patch: pytest.MonkeyPatch) -> None:
    timeline = card.timeline

    class Stream:
        def __init__(self, device: Any = None, priority: int = 0, actor: Any = None) -> None:
            self.actor = actor or timeline.new_stream()
            self.device = CARD

        def wait_stream(self, other: Stream) -> None:
            self.actor.learn(other.actor.seen)

        def wait_event(self, event: Event) -> None:
            self.actor.learn(event.seen)

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self) -> None:
            timeline.wait_for(self.actor, "synchronising a stream")

    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
            self.seen: dict[int, int] = {}

        def record(self, stream: Stream | None = None) -> None:
            actor = stream.actor if stream is not None else timeline.current
            actor.learn(timeline.host.seen)
            self.seen = dict(actor.seen)

        def wait(self, stream: Stream | None = None) -> None:
            (stream.actor if stream is not None else timeline.current).learn(self.seen)

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Event) -> float:
            return 1.0

        def synchronize(self) -> None:
            timeline.waits.append("synchronising an event")
            timeline.host.learn(self.seen)

    streams = {actor.number: Stream(actor=actor) for actor in timeline.streams}

    @contextmanager
    def stream(chosen: Stream | None) -> Iterator[None]:
        before = timeline.current
        if chosen is not None:
            timeline.current = chosen.actor
        try:
            yield
        finally:
            timeline.current = before

    def current_stream(device: Any = None) -> Stream:
        number = timeline.current.number
        if number not in streams:
            streams[number] = Stream(actor=timeline.current)
        return streams[number]

    for name, value in (("Stream", Stream), ("Event", Event), ("stream", stream), ("current_stream", current_stream)):
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.cuda, "default_stream", lambda device=None: streams[0])


def _install_driver(card: StandIn, patch: pytest.MonkeyPatch) -> None:
    memory, timeline = card.memory, card.timeline

    def set_fraction(fraction: float, index: int) -> None:
        assert index == 0
        memory.fraction = fraction
        memory.lowest_fraction = min(memory.lowest_fraction, fraction)

    def synchronize(device: Any = None) -> None:
        for actor in timeline.streams:
            timeline.wait_for(actor, "synchronising the device")

    def reset_peak(device: Any = None) -> None:
        memory.peak = memory.allocated

    properties = SimpleNamespace(name=NAME, total_memory=memory.total, multi_processor_count=128, major=8, minor=9)
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (8, 9),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (memory.free, memory.total),
        "memory_allocated": lambda device=None: memory.allocated,
        "max_memory_allocated": lambda device=None: memory.peak,
        "memory_reserved": lambda device=None: memory.allocated,
        "max_memory_reserved": lambda device=None: memory.peak,
        "reset_peak_memory_stats": reset_peak,
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: None,
        "is_initialized": lambda: card.memory.allocations > 0,
        "synchronize": synchronize,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "get_arch_list": lambda: ["sm_80", "sm_86", "sm_89", "sm_90"],
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)
    # set_per_process_memory_fraction itself is torch's own: what it refuses, a card's torch refuses.
    patch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    patch.setattr(hardware, "_first_card", lambda: ("GPU-stand-in", memory.total))
    patch.setattr(hardware, "_free_bytes", lambda name: memory.total - memory.others)
    patch.setattr(torch._C, "_cuda_setMemoryFraction", set_fraction, raising=False)
    patch.setattr(torch.version, "cuda", "13.0")


def _install_makers(card: StandIn, patch: pytest.MonkeyPatch) -> None:
    for name in MAKERS:
        patch.setattr(torch, name, _maker(card, getattr(torch, name), name))
    for name in NEW:
        patch.setattr(Tensor, name, _maker(card, getattr(Tensor, name), name))


def _maker(card: StandIn, real: Callable[..., Any], name: str) -> Callable[..., Any]:
    unset = name in ("empty", "empty_like", "empty_strided", "new_empty")

    def make(*args: Any, **kwargs: Any) -> Any:
        place = _place_of(kwargs.get("device"))
        if kwargs.pop("pin_memory", False):
            place = "pinned"
        if place is None:
            return real(*args, **kwargs)
        kwargs["device"] = "cpu"
        with card.making(place):
            made: Tensor = real(*args, **kwargs)
        if place != "host":
            card.memory.settle(made, place, written=not unset)
        if place == "card" and name in ("tensor", "as_tensor", "new_tensor"):
            card.timeline.wait_for(card.timeline.current, f"{name} from the host's data")
        return made

    return make


def _install_methods(card: StandIn, patch: pytest.MonkeyPatch) -> None:
    memory, timeline = card.memory, card.timeline
    real_device, real_to, real_list, real_numpy = Tensor.device, Tensor.to, Tensor.tolist, Tensor.numpy

    def device(self: Tensor) -> torch.device:
        found: torch.device = real_device.__get__(self)  # type: ignore[attr-defined]
        return CARD if found.type == "cpu" and memory.place(self) == "card" else found

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        wanted, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        place = _place_of(wanted)
        here = "card" if memory.place(self) == "card" else "host"
        if self.is_meta or (wanted is not None and place is None):
            return real_to(self, *args, **kwargs, copy=copy)  # type: ignore[no-any-return, call-overload]
        moving = place is not None and place != here
        with card.making(place if moving or (copy and place) else None):
            made: Tensor = real_to(
                self, dtype=dtype or self.dtype, copy=copy or moving, non_blocking=non_blocking,
                **({"memory_format": memory_format} if memory_format else {}),
            )  # fmt: skip
        return made

    def pin_memory(self: Tensor, device: Any = None) -> Tensor:
        made = torch.empty(self.shape, dtype=self.dtype, pin_memory=True)
        return made.copy_(self)

    def record_stream(self: Tensor, stream: Any) -> None:
        use = memory.use(self)
        assert use is not None, "record_stream of a tensor that is not on the card"
        use.lent.add(stream.actor.number)

    def tolist(self: Tensor) -> Any:
        if memory.place(self) == "card":
            timeline.wait_for(timeline.current, "reading a list")
        return real_list(self)

    def numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if memory.place(self) == "card":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return real_numpy(self, *args, **kwargs)

    patch.setattr(Tensor, "device", property(device))
    patch.setattr(Tensor, "is_cuda", property(lambda self: memory.place(self) == "card"))
    patch.setattr(Tensor, "to", to)
    patch.setattr(Tensor, "cpu", lambda self: to(self, "cpu"))
    patch.setattr(Tensor, "cuda", lambda self, device=None, non_blocking=False: to(self, CARD, None, non_blocking))
    patch.setattr(Tensor, "pin_memory", pin_memory)
    patch.setattr(Tensor, "is_pinned", lambda self, device=None: memory.place(self) == "pinned")
    patch.setattr(Tensor, "record_stream", record_stream)
    patch.setattr(Tensor, "tolist", tolist)
    patch.setattr(Tensor, "numpy", numpy)
