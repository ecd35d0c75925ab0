"""Base streaming: the 4-bit layers stay in host memory and visit the card one decoder block at a time.

Two slots on the card each hold one block. While block i computes out of one slot, the next block is copied into the
other on a stream of its own: block i + 1 in the forward pass, block i - 1 in backward, where activation checkpointing
runs each block's forward again right before its backward. The copy of a block waits for the work of the block that
held the slot, the work of a block waits for its copy; nothing else waits, and the host never does (but for a drive
that is slower than the card, where the base lies in files: ``staging``). At 2048 tokens a step an 8B block computes
longer than its 110 MB take over PCIe 4.0, so the copy hides.

Some blocks may stay on the card for good (*resident*). They are spread evenly, so that each copy has the arithmetic of
several blocks to hide behind.

The hooks stand on the linear layers and not on the blocks: a block's own hooks do not run again when checkpointing
recomputes its forward, its children's do. Weights that are used in backward are the ones that the recomputed forward
saw, in the slot that it used; without checkpointing a slot would have been overwritten by then, which autograd notices
and refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.adapters.linear import QRosaLinear
from qrosa.adapters.rank_units import layer_index
from qrosa.offload.packing import FlatWeight
from qrosa.offload.staging import StagedBlocks
from qrosa.quant.nf4 import NF4Weight

SLOTS = 2


class _Slot:
    """Room for one block on the card."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.block = -1
        self.filled = torch.cuda.Event() if device.type == "cuda" else None


class BaseStream:
    """Feeds the quantised layers of a model to its device, block by block.

    Args:
        model: A base whose embeddings, norms and head are on ``device``.
        flats: Module path -> the layer's bytes on the host, for every quantised layer.
        device: Where the model computes.
        resident: Number of blocks that stay on ``device``.
    """

    def __init__(
        self, model: nn.Module, flats: dict[str, FlatWeight], device: torch.device | str, resident: int = 0
    ) -> None:
        self.device = torch.device(device)
        layers = quantized_linears(model)
        indices = sorted({layer_index(path) for path in layers})
        self.blocks: list[list[tuple[QRosaLinear, FlatWeight]]] = [
            [(layer, flats[path]) for path, layer in layers.items() if layer_index(path) == index] for index in indices
        ]
        self.resident = set(spread(len(self.blocks), resident))
        self.streamed = [block for block in range(len(self.blocks)) if block not in self.resident]
        self._code: Tensor | None = None
        self._views: dict[tuple[int, int], list[NF4Weight]] = {}
        self._staged = self._stage()
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for block in self.resident:
            self._make_resident(block)
        largest = max((self._block_bytes(block) for block in self.streamed), default=0)
        self.slots = [_Slot(largest, self.device) for _ in range(min(SLOTS, len(self.streamed)))]
        self._current = -1
        self._handles = [
            layer.register_forward_pre_hook(self._hook(block))
            for block, members in enumerate(self.blocks)
            for layer, _ in members
        ]

    def _stage(self) -> StagedBlocks | None:
        """Reads ahead where a card would have to copy out of files."""
        files = {block: [flat for _, flat in self.blocks[block]] for block in self.streamed}
        in_files = any(flat.path is not None for flats in files.values() for flat in flats)
        return StagedBlocks(files) if in_files and self.device.type == "cuda" else None

    @property
    def device_bytes(self) -> int:
        """Packed bytes on the device: the slots and the resident blocks."""
        return sum(slot.buffer.numel() for slot in self.slots) + sum(map(self._block_bytes, self.resident))

    def close(self) -> None:
        """Take the hooks off; the layers read from the host again."""
        if self._copies is not None:  # a copy may be under way into what is given up here
            self._copies.synchronize()
        for handle in self._handles:
            handle.remove()
        for block in self.streamed:
            self._point(block, None)
        self.slots, self._views = [], {}

    def _hook(self, block: int) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if block != self._current:
                self._enter(block)

        return enter

    def _enter(self, block: int) -> None:
        """Make ``block`` ready to compute and start to fetch the one that follows."""
        keep = None
        if block not in self.resident:
            keep = self._slot_of(block) or self._fetch(block, keep=None)
            if keep.filled is not None:
                torch.cuda.current_stream(self.device).wait_event(keep.filled)
        self._prefetch(self._following(block), keep)
        self._current = block  # last: after a copy that failed, the block is still to be entered

    def _following(self, block: int) -> int | None:
        """The streamed block that computes next: downwards inside a backward pass, upwards otherwise."""
        inside_backward = torch._C._current_graph_task_id() != -1
        later = [other for other in self.streamed if (other < block if inside_backward else other > block)]
        if later:
            return later[-1] if inside_backward else later[0]
        if inside_backward:
            return None  # the next forward pass starts at the lowest streamed block: in a slot, or just left it
        if torch.is_grad_enabled():
            below = [other for other in self.streamed if other < block]
            return below[-1] if below else None  # the backward pass turns around here
        return self.streamed[0] if self.streamed else None

    def _prefetch(self, block: int | None, keep: _Slot | None) -> None:
        if block is not None and self._slot_of(block) is None:
            self._fetch(block, keep)
            after = self._following(block)
            if self._staged is not None and after is not None and self._slot_of(after) is None:
                self._staged.expect(after)

    def _fetch(self, block: int, keep: _Slot | None) -> _Slot:
        """Copy a block into a slot other than ``keep``, after the work that the slot's old block still has to do."""
        slot = next(slot for slot in self.slots if slot is not keep)
        if slot.block >= 0:
            self._point(slot.block, None)
        slot.block = -1  # what a copy that fails leaves there is no block
        if self._copies is None:
            self._copy(block, slot)
        else:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._copies):
                self._copy(block, slot)
            assert slot.filled is not None
            slot.filled.record(self._copies)
        slot.block = block
        self._point(block, slot)
        return slot

    def _copy(self, block: int, slot: _Slot) -> None:
        if self._staged is not None:
            nbytes = self._block_bytes(block)
            slot.buffer[:nbytes].copy_(self._staged.take(block)[:nbytes], non_blocking=True)
            assert self._copies is not None
            self._staged.copied(block, self._copies.record_event())
            return
        start = 0
        for _, flat in self.blocks[block]:
            slot.buffer[start : start + flat.nbytes].copy_(flat.data, non_blocking=True)
            start += flat.nbytes

    def _point(self, block: int, slot: _Slot | None) -> None:
        """Let the block's layers read from ``slot``, or from the host when None."""
        place = -1 if slot is None else self.slots.index(slot)
        if (block, place) not in self._views:  # some 35 views a block: made once
            self._views[block, place] = self._look_at(block, slot)
        for (layer, _), weight in zip(self.blocks[block], self._views[block, place], strict=True):
            layer.weight = weight

    def _look_at(self, block: int, slot: _Slot | None) -> list[NF4Weight]:
        weights, start = [], 0
        for _, flat in self.blocks[block]:
            here = None if slot is None else slot.buffer[start : start + flat.nbytes]
            weights.append(flat.weight() if here is None else self._on_device(flat, here))
            start += flat.nbytes
        return weights

    def _make_resident(self, block: int) -> None:
        for layer, flat in self.blocks[block]:
            layer.weight = self._on_device(flat, flat.data.to(self.device, copy=True))

    def _on_device(self, flat: FlatWeight, data: Tensor) -> NF4Weight:
        code = flat.template.absmax_code
        if code is not None:
            if self._code is None:  # one map serves all layers; a copy for each would make the host wait
                self._code = code.to(self.device)
            code = self._code
        return flat.views(data, code)

    def _slot_of(self, block: int) -> _Slot | None:
        return next((slot for slot in self.slots if slot.block == block), None)

    def _block_bytes(self, block: int) -> int:
        return sum(flat.nbytes for _, flat in self.blocks[block])


def spread(blocks: int, resident: int) -> Sequence[int]:
    """Which of ``blocks`` stay on the card: ``resident`` of them, evenly spaced."""
    resident = min(resident, blocks)
    return [(2 * place + 1) * blocks // (2 * resident) for place in range(resident)]
