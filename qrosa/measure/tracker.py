"""Counting the bytes of tensors, real or without data, as they come and go.

A dispatch mode sees every operator that a step runs, below autograd, and so every tensor that is made: by the model, by
autograd, by the optimizer. Each storage is counted once, however many views it has, and until its last reference
is gone. What is counted is kept as a list with times of birth and death; the highest moment and all that was alive
at it are read off afterwards, which is cheaper than a copy of the list at each new maximum.

On the ``meta`` device tensors have sizes and no data, so the mode also answers the few questions that a step asks of
its data: every position but one is supervised (so that supervised ones are copied out, as a run does that has prompts),
every number is 1, and the only yes or no (does padding hide anything?) is the caller's to say. Copies to the host copy
nothing. ``FakeTensorMode`` was not taken: its CUDA tensors need a torch built with CUDA as soon as autograd looks at
them, and transformers takes it for a tracer, for which it builds attention masks that a real step does without.

``qrosa::linear`` and its backward are opaque to autograd and not to this mode: they run as the compositions that they
are, so that the dense weight and the low-rank products are counted like everything else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from qrosa.ops.linear import backward, forward
from qrosa.ops.schema import LINEAR, LINEAR_BACKWARD

_aten, _qrosa = torch.ops.aten, torch.ops.qrosa
_PATH = "qrosa_module"  # key in an autograd node's metadata
FORWARD, EVALUATION, UPDATE = "forward", "evaluation", "update"


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage.

    Attributes:
        size: Bytes that the allocator hands out for it.
        shape: Of the tensor that it was made for.
        dtype: Of the same.
        component: What it is for, in the words of the plan.
        module: Path of the module that made it, or an operator outside of modules.
        born: The count of allocations when it was made.
        died: The count of allocations when it was freed, None while it lives.
    """

    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    component: str
    module: str
    born: int
    died: int | None = None

    def alive(self, moment: int) -> bool:
        """Whether it was there just after allocation number ``moment``."""
        return self.born <= moment and (self.died is None or self.died >= moment)


@dataclass(frozen=True)
class Peak:
    """The highest moment of a phase.

    Attributes:
        total: Bytes.
        allocations: All that was alive.
        moment: When it was, in words.
    """

    total: int
    allocations: tuple[Allocation, ...]
    moment: str

    @property
    def components(self) -> dict[str, int]:
        """Component -> bytes."""
        made: dict[str, int] = {}
        for allocation in self.allocations:
            made[allocation.component] = made.get(allocation.component, 0) + allocation.size
        return made


class StorageTracker(TorchDispatchMode):
    """Counts the storages of one device while it is entered.

    Args:
        device: ``meta`` or ``cpu``; other devices' tensors are passed over.
        granule: Sizes are rounded up to multiples of this.
        hidden: Operator -> bytes that its kernel takes beside its results, for the kernels of the device that is meant.

    Attributes:
        stage: What goes on outside of backward, which is noticed by itself: ``FORWARD``, ``EVALUATION`` or ``UPDATE``.
        padded: The rows of the micro-batch differ in length (asked on ``meta`` only, where a mask cannot be read).
        live: Bytes now.
    """

    def __init__(
        self,
        device: str,
        *,
        granule: int = 1,
        hidden: Callable[[Any, tuple[Any, ...]], int] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.granule = granule
        self.padded = False
        self.hidden = hidden or (lambda func, args: 0)
        self.stage = FORWARD
        self.live = 0
        self._count = 0
        self._peak, self._peak_count, self._moment = 0, 0, ""
        self._known: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self._records: list[Allocation] = []
        self._stack: list[str] = []
        self._backward_path = ""
        self._inside_linear = False

    @contextmanager
    def phase(self) -> Iterator[list[Peak]]:
        """Yields a list that holds the block's ``Peak`` once it is left."""
        self._records = [record for _, record in self._known.values()]
        self._peak, self._peak_count, self._moment = self.live, self._count, "at its beginning"
        found: list[Peak] = []
        yield found
        alive = tuple(record for record in self._records if record.alive(self._peak_count))
        found.append(Peak(self._peak, alive, self._moment))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While inside, allocations know the module of ``model`` that makes them, in backward too."""
        paths = {module: path or type(model).__name__ for path, module in model.named_modules()}

        def enter(module: nn.Module, inputs: Any) -> None:
            self._stack.append(paths.get(module, type(module).__name__))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            path = self._stack.pop()
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.grad_fn is not None:
                cast(Any, first.grad_fn).metadata[_PATH] = path

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def count(self, tensor: Tensor, component: str, module: str = "") -> None:
        """Count a tensor that was made outside, or say what one is for."""
        record = self._record(tensor, component)
        if record is not None:
            record.component = component
            record.module = module or record.module

    def forget(self, tensor: Tensor) -> None:
        """Take a tensor out of the count: it stands for one that lies elsewhere."""
        known = self._known.pop(tensor.untyped_storage()._cdata, None)
        if known is not None:
            self._records.remove(known[1])
            self.live -= known[1].size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what it makes."""
        if func in (_qrosa.linear.default, _qrosa.linear_backward.default):
            return self._composed(func, args)
        result = self._answer(func, args) if self.device == "meta" else NotImplemented
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        self._record_all(result)
        hidden = self.hidden(func, args)
        if hidden:
            self.pass_through(hidden, str(func))
        return result

    def _composed(self, func: Any, args: tuple[Any, ...]) -> Any:
        """``qrosa::linear`` or its backward, operator by operator."""
        self._inside_linear = True
        try:
            with self, torch.no_grad():
                if func is _qrosa.linear.default:
                    result: Any = forward(*LINEAR.split(args))
                else:
                    result = backward(*LINEAR_BACKWARD.split(args))
        finally:
            self._inside_linear = False
        component = self._component()
        for place, tensor in enumerate(result):
            gradient = func is _qrosa.linear_backward.default and place > 0
            self.count(tensor, "micro_batch_gradients" if gradient else component)
        return result

    def _answer(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What an operator gives that would have to look at data; NotImplemented for all others."""
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return not self.padded if args[0].dtype == torch.bool else 1
        if func is _aten.nonzero.default and args[0].is_meta:
            return args[0].new_empty((args[0].numel() - 1, args[0].dim()), dtype=torch.int64)
        if func is _aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]  # to the host
        if func is _aten.index.Tensor and args[0].is_meta and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
            mask = args[1][0]
            return args[0].new_empty((mask.numel(), *args[0].shape[mask.dim() :]))
        return NotImplemented

    def _record_all(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self._record(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._record(item)

    def _record(self, tensor: Tensor, component: str | None = None) -> Allocation | None:
        """The allocation of a tensor's storage, counted now if it is new; None for other devices' and empty ones."""
        if tensor.device.type != self.device:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return self._known[key][1]
        size = -(-storage.nbytes() // self.granule) * self.granule
        if not size:
            return None
        component = component or self._component(tensor)
        record = Allocation(size, tuple(tensor.shape), tensor.dtype, component, self._path(), self._count + 1)
        self._known[key] = (weakref.ref(storage, lambda _: self._freed(key)), record)
        self._add(record)
        return record

    def _add(self, record: Allocation) -> None:
        self._count += 1
        self._records.append(record)
        self.live += record.size
        if self.live > self._peak:
            self._peak, self._peak_count, self._moment = self.live, self._count, self._words(record)

    def _freed(self, key: int) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            known[1].died = self._count
            self.live -= known[1].size

    def pass_through(self, size: int, name: str) -> None:
        """Count memory that a kernel takes and gives back."""
        size = -(-size // self.granule) * self.granule
        component = "loss" if self._component() == "loss" else "workspace"
        record = Allocation(size, (size,), torch.uint8, component, f"{self._path()} ({name})", self._count + 1)
        self._add(record)
        record.died = self._count
        self.live -= size

    def _component(self, tensor: Tensor | None = None) -> str:
        """What a new tensor is for, by when it is made."""
        if self.stage == UPDATE:
            return "optimizer"
        if self._inside_linear:
            # Only the scratch that lasts is made as bytes.
            return "scratch" if tensor is not None and tensor.dtype == torch.uint8 else "workspace"
        node = torch._C._current_autograd_node()
        if node is None:
            if not self._stack:
                return "loss"
            if "." not in self._stack[-1]:
                return "masks"  # the decoder itself, outside its layers
            return "activations" if self.stage == FORWARD else "workspace"
        if self._stack or torch.is_grad_enabled():
            return "activations"  # recomputed
        return "micro_batch_gradients" if node.name() == "torch::autograd::AccumulateGrad" else "workspace"

    def _path(self) -> str:
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is not None:
            self._backward_path = cast(Any, node).metadata.get(_PATH, self._backward_path)
            return self._backward_path
        return "optimizer" if self.stage == UPDATE else "loss"

    def _words(self, record: Allocation) -> str:
        if torch._C._current_autograd_node() is not None:
            return f"backward through {record.module}"
        if self.stage == UPDATE:
            return "the optimizer step"
        return f"forward through {record.module}" if self._stack else "computing the loss"
