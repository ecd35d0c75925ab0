"""The card itself: a dispatch mode under which tensors that are said to lie on it are used as on a card.

Data stays in host memory and the CPU's kernels compute, so every result is right; what is checked is what a card would
mind: operands on different devices, memory used in an order that no stream or event enforces, more bytes than there
are, kernels that strict determinism refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.card.standin import kernels
from tests.card.standin.memory import Memory
from tests.card.standin.timeline import Actor, Timeline

_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_LOOKS_AT_DATA = {
    _aten._local_scalar_dense.default: "reading a value",
    _aten.nonzero.default: "nonzero",
    _aten.equal.default: "comparing",
    _aten.masked_select.default: "masked_select",
    _aten._unique2.default: "unique",
}
_SHAPE_ONLY = {
    "empty_like",
    "new_empty",
    "new_empty_strided",
}  # read no data, and give none
_FROM_SHAPE = _SHAPE_ONLY | {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
_FACTORIES = {"empty", "empty_strided"}
_HOST_INDICES = {"index", "index_put_", "index_put", "_index_put_impl_"}  # take indices from the host


class StandIn(TorchDispatchMode):
    """One card.

    Args:
        total: Bytes of its memory.
        others: Bytes that other programs use.

    Attributes:
        timeline: Streams, events, and what made the host wait.
        memory: Bytes and places.
        target: Where tensors that are made now go, None for where their operands are.
        fail_copies: Copies from the host to fail with an out-of-memory error, counted down.
    """

    def __init__(self, total: int = 8 << 30, others: int = 0) -> None:
        super().__init__()
        self.timeline = Timeline()
        self.memory = Memory(self.timeline, total, others)
        self.target: str | None = None
        self.fail_copies = 0

    @property
    def waits(self) -> list[str]:
        """What made the host wait for the card."""
        return self.timeline.waits

    @contextmanager
    def making(self, place: str | None) -> Iterator[None]:
        """While inside, new tensors go to ``place``."""
        before, self.target = self.target, place
        try:
            yield
        finally:
            self.target = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Check an operation, run it, and say where its results lie."""
        kwargs = kwargs or {}
        tensors = list(_tensors([*args, *kwargs.values()]))
        if any(tensor.is_meta for tensor in tensors) or str(kwargs.get("device")) == "meta":
            return func(*args, **kwargs)
        if func in _COPIES and (self.target is not None or func is _aten.copy_.default):
            return self._copy(func, args, kwargs)
        places = [self.memory.place(tensor) for tensor in tensors]
        on_card = "card" in places
        self._refuse_mixture(func, tensors, places)
        if not _is_view(func):
            actor = self.timeline.current if on_card else self.timeline.host
            if on_card:
                kernels.check_determinism(func, args)
            self._use(func, args, kwargs, actor)
        result = func(*args, **kwargs)
        if on_card:
            result = kernels.disturbed(func, result)
            if func in _LOOKS_AT_DATA or _masks(func, args):
                self.timeline.wait_for(self.timeline.current, _LOOKS_AT_DATA.get(func, "indexing by a mask"))
        self._settle(func, result, self.target or ("card" if on_card else "host"))
        return result

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A copy, perhaps between host and card: on the current stream, waited for unless both ends allow not to."""
        into = func is _aten.copy_.default
        source: Tensor = args[1] if into else args[0]
        come_from = self.memory.place(source)
        go_to = self.memory.place(args[0]) if into else self.target or come_from
        crossing = (come_from == "card") != (go_to == "card")
        if crossing and go_to == "card" and self.fail_copies:
            self.fail_copies -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        actor = self.timeline.current if "card" in (come_from, go_to) else self.timeline.host
        time = self.timeline.step(actor)
        read, write = self.memory.use(source), self.memory.use(args[0]) if into else None
        if read is not None:
            self.timeline.read(actor, read, f"{func}")
        if write is not None:
            self.timeline.write(actor, write, f"{func}")
        result = func(*args, **kwargs)
        self._settle(func, result, go_to)
        asynchronous = kwargs.get("non_blocking", args[2] if into and len(args) > 2 else False)
        other_end = come_from if go_to == "card" else go_to
        if crossing and not (asynchronous and other_end == "pinned"):
            self.timeline.wait_for(actor, f"a copy {'from' if go_to == 'card' else 'to'} {other_end} memory")
        assert time
        return result

    def _refuse_mixture(self, func: Any, tensors: list[Tensor], places: list[str]) -> None:
        name = func._schema.name.rpartition("::")[2]
        if "card" not in places or name in _HOST_INDICES:
            return
        for tensor, place in zip(tensors, places, strict=True):
            if place != "card" and tensor.dim() > 0:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"({func} with {tuple(tensor.shape)} in {place} memory)"
                )

    def _use(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], actor: Actor) -> None:
        """Record what an operation reads and writes."""
        name = func._schema.name.rpartition("::")[2]
        self.timeline.step(actor)
        written = []
        for place, argument in enumerate(func._schema.arguments):
            value = kwargs.get(argument.name, args[place] if place < len(args) else None)
            changes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors([value]):
                use = self.memory.use(tensor)
                if use is None:
                    continue
                if changes:
                    written.append(use)
                elif name not in _FROM_SHAPE:
                    self.timeline.read(actor, use, str(func))
        for use in written:
            self.timeline.write(actor, use, str(func))

    def _settle(self, func: Any, result: Any, place: str) -> None:
        name = func._schema.name.rpartition("::")[2]
        if place == "host":
            return
        unset = name in _SHAPE_ONLY | _FACTORIES or _is_view(func)
        for tensor in _tensors([result]):
            self.memory.settle(tensor, place, written=not unset)


def _tensors(values: list[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(list(value))


def _is_view(func: Any) -> bool:
    """An operation that gives another look at its operand's memory and touches no data."""
    returned = func._schema.returns
    return bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)


def _masks(func: Any, args: tuple[Any, ...]) -> bool:
    if func is not _aten.index.Tensor:
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])
