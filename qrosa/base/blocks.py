"""The 16-bit model, one decoder block at a time: what a model of any size is calibrated with on a small card.

All calibration rows go through the model in one pass. When a block's turn comes its weights are read, its visitor runs
it (as often as it likes, in micro-batches), and the weights are dropped again. On the device lie the embeddings, the
rows' hidden states [B, L, D], one block's weights and one micro-batch's activations, however deep the model is, and
each weight is read once.

The model's own code drives the pass, with each block wrapped: masks, rotary tables and whatever else a family hands
its blocks arrive as that family makes them, and nothing here knows families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import target_linears
from qrosa.base.base_files import BaseFiles
from qrosa.base.build import meta_model
from qrosa.base.load import fill_buffers, move_buffers, read_dense, set_parameter
from qrosa.heap import look

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Block:
    """A decoder block while its weights are there.

    Attributes:
        path: Such as ``model.layers.3``.
        index: Its place in the stack.
        module: The block, weights on the device.
    """

    path: str
    index: int
    module: nn.Module

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers in it by full path, in model order."""
        inside = self.module.named_modules()
        return {f"{self.path}.{name}": module for name, module in inside if isinstance(module, nn.Linear)}


Visit = Callable[[Block, Run], Tensor]


class BlockwiseModel:
    """A dense base whose decoder blocks visit the device one by one.

    Args:
        base_files: A base with 16-bit weights.
        device: Where blocks compute.
        micro_batch: Rows that a block computes at once.

    Attributes:
        blocks: The decoder blocks, in order.
        outside: Names of the parameters that lie in no block.

    Raises:
        InputError: Not a model that can be a base.
    """

    def __init__(self, base_files: BaseFiles, device: torch.device, micro_batch: int = 8) -> None:
        self.base_files, self.device, self.micro_batch = base_files, device, micro_batch
        # bf16 products are slow on most CPUs, and fp32 rounds less.
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = meta_model(base_files.config, self.dtype).eval()
        self.model.requires_grad_(False)
        fill_buffers(self.model, base_files)
        path, stack = _stack(self.model)
        self.blocks = [Block(f"{path}.{index}", index, module) for index, module in enumerate(stack)]
        for block in self.blocks:
            stack[block.index] = _Wrapped(block, self)  # the model now lists what lies outside the blocks only
        self.model.tie_weights()  # a tied head is then listed once, as the embedding
        self.outside = [name for name, _ in self.model.named_parameters()]
        for name in self.outside:
            set_parameter(self.model, name, self._read(name))
        self.model.tie_weights()
        move_buffers(self.model, device)
        self._visit: Visit | None = None

    @torch.no_grad()
    def run(self, ids: Tensor, visit: Visit | None = None) -> Tensor:
        """One pass over token rows int64 [B, L]: the last hidden states [B, L, D].

        Args:
            ids: Rows of equal length.
            visit: Called with each block and a function that runs it on all rows; what it returns goes on to the next
                block. Default: just runs it.
        """
        self._visit = visit or (lambda _, run: run())
        try:
            output = cast(Any, self.model).get_decoder()(input_ids=ids.to(self.device), use_cache=False)
        finally:
            self._visit = None
        return cast(Tensor, output.last_hidden_state)

    def pass_block(self, block: Block, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Bring the block's weights, let the visitor run it, and drop them."""
        assert self._visit is not None
        shells = dict(block.module.named_parameters())
        for name in shells:
            set_parameter(block.module, name, self._read(f"{block.path}.{name}"))
        move_buffers(block.module, self.device)
        as_tuple = False

        def run() -> Tensor:
            nonlocal as_tuple
            parts = []
            for start in range(0, len(hidden), self.micro_batch):
                look()
                rows = slice(start, start + self.micro_batch)
                cut_args = [_cut(value, rows, len(hidden)) for value in args]
                cut_kwargs = {name: _cut(value, rows, len(hidden)) for name, value in kwargs.items()}
                output = block.module(hidden[rows], *cut_args, **cut_kwargs)
                as_tuple = isinstance(output, tuple)
                parts.append(output[0] if as_tuple else output)
            return torch.cat(parts)

        result = self._visit(block, run)
        for name, shell in shells.items():
            set_parameter(block.module, name, shell.detach())
        return (result,) if as_tuple else result

    def _read(self, name: str) -> Tensor:
        return read_dense(self.base_files, name).to(self.device, self.dtype)


@contextmanager
def rounded_products() -> Iterator[None]:
    """While inside, products of fp32 may round their operands; sums stay fp32.

    To bf16 on processors with units for it, where the pass is 1.6 times as fast; to TF32 on cards, where a block
    computes in bf16 anyway.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Wrapped(nn.Module):
    """Stands in a block's place in the model's stack; its other attributes are the block's."""

    def __init__(self, block: Block, owner: BlockwiseModel) -> None:
        super().__init__()
        self.__dict__["block"], self.__dict__["owner"] = block, owner  # no submodules: the model must not list them

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"].module, name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        block: Block = self.__dict__["block"]
        return self.__dict__["owner"].pass_block(block, hidden_states, args, kwargs)


def _cut(value: Any, rows: slice, count: int) -> Any:
    """The rows of a tensor that has one entry a row (first dimension ``count``); all else as it is."""
    if isinstance(value, tuple):
        return tuple(_cut(item, rows, count) for item in value)
    return value[rows] if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == count else value


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder blocks: the list of modules that the linear layers which take adapters lie in."""
    first = next(iter(target_linears(model)))
    stacks = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    return next((path, part) for path, part in stacks if first.startswith(f"{path}."))
