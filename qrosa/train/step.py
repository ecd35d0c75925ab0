"""The gradients of one optimizer step, whatever micro-batches it takes to get them.

The effective batch is a promise, the micro-batch a means. The loss of a step is the sum over all its supervised tokens
divided by their number, over all micro-batches and processes, so the split changes nothing but rounding. When memory
runs out, the step's gradients so far are thrown away, the micro-batch is halved (rows and tokens) and the step begins
again: earlier steps are untouched, and the repeated step is the one that the smaller split would have given at once.

Each micro-batch seeds the generators from (seed, step, process, index) before its forward pass: dropout can be
repeated after a restart without any saved generator state.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from qrosa.data.batching import Limits, MicroBatch, micro_batches
from qrosa.errors import DoesNotFitError
from qrosa.model.head import CHUNK_TOKENS
from qrosa.optim.parts import Optimizer
from qrosa.train.loss import model_loss

if TYPE_CHECKING:
    from qrosa.data.encode import EncodedRow

_Found = TypeVar("_Found")


def micro_batch_seed(seed: int, step: int, process: int, index: int) -> int:
    """A generator seed in [0, 2^63) that no two micro-batches of a run share but by chance."""
    digest = hashlib.blake2b(f"{seed}/{step}/{process}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: torch's on a card, or on the CPU, or Python's own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    words = ("DefaultCPUAllocator", "out of memory", "could not create a primitive")  # the last: oneDNN's own
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def free_memory() -> None:
    """Give back what a broken-off computation left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class StepRunner:
    """Computes the gradients of optimizer steps into the optimizer's flat buffers.

    Args:
        model: The model, adapters in place.
        optimizer: Owner of the flat gradients.
        limits: Micro-batch to start with; ``self.limits`` holds the one now in use.
        pad_id: Token that shorter rows are filled up with.
        seed: The run's seed.
        device: Where the model is.
        chunk_tokens: Positions whose logits exist at once.
        process: Index of this process among those that share a step.
        packed: Micro-batches have no padding; the model's attention goes by row.
        on_shrink: Called with (step, limits before, limits after) when memory ran out.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        limits: Limits,
        pad_id: int,
        seed: int,
        device: torch.device,
        chunk_tokens: int = CHUNK_TOKENS,
        process: int = 0,
        packed: bool = False,
        on_shrink: Callable[[int, Limits, Limits], None] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.limits = limits
        self.pad_id = pad_id
        self.seed = seed
        self.device = device
        self.chunk_tokens = chunk_tokens
        self.process = process
        self.packed = packed
        self.on_shrink = on_shrink

    def gradients(self, rows: Sequence[EncodedRow], step: int, normaliser: int) -> float:
        """Add the gradient of ``sum of losses / normaliser`` over ``rows`` to the optimizer's flat gradients.

        Args:
            rows: This process's rows of the step; may be empty.
            step: Optimizer step, from 0.
            normaliser: Supervised tokens of the step over all processes.

        Returns:
            The sum of the rows' losses.

        Raises:
            DoesNotFitError: A single row does not fit the memory.
        """
        return self._fitted(rows, step, lambda batches: self._run(batches, step, normaliser))

    def _fitted(self, rows: Sequence[EncodedRow], step: int, compute: Callable[[list[MicroBatch]], _Found]) -> _Found:
        """What ``compute`` makes of the rows' micro-batches, begun again with smaller ones where memory runs out."""
        while True:
            batches = micro_batches(
                rows,
                max_rows=self.limits.rows,
                max_tokens=self.limits.tokens,
                pad_id=self.pad_id,
                packed=self.packed,
            )
            try:
                return compute(batches)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, whose traceback would keep the activations alive.
            self.optimizer.zero_gradients()
            self._shrink(batches, step)

    def _run(self, batches: Sequence[MicroBatch], step: int, normaliser: int) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            torch.manual_seed(micro_batch_seed(self.seed, step, self.process, index))
            loss, _ = model_loss(self.model, batch.to(self.device), self.chunk_tokens)
            (loss / normaliser).backward()
            total += loss.detach()
            self.optimizer.accumulate()
        return float(total)

    def _shrink(self, batches: Sequence[MicroBatch], step: int) -> None:
        free_memory()
        rows = max(len(batch.row_ids) for batch in batches)
        tokens = max(batch.padded_tokens for batch in batches)
        if rows == 1:
            raise DoesNotFitError(
                f"one row of {tokens} tokens does not fit the memory",
                "shorten the rows with --seq-len, or turn activation checkpointing on (--checkpointing on)",
            )
        before = self.limits
        # From what was really computed at once: limits far above it would halve in vain.
        self.limits = Limits(min(before.rows, rows), min(before.tokens, tokens)).halved()
        if self.on_shrink is not None:
            self.on_shrink(step, before, self.limits)
