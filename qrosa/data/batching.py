"""Which rows make a step, and how a step's rows are laid out as tensors.

The order of rows is a **pure function of seed and step**: epochs are seeded permutations laid end to end, a step
takes the next ``batch_size`` places. There is no sampler to save: a resumed run computes where it was.

A step's rows are sorted by length and cut into micro-batches bounded in rows and in padded tokens, so little is
padding, and memory is bounded by the longest micro-batch, which comes **first**: what does not fit fails at once,
not at the worst step. A loss summed over tokens and divided by the step's supervised tokens does not depend on
the cut. Padding is to the right and known by place (``attention_mask``, label -100), never by the pad token's value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from qrosa.data.encode import IGNORE, EncodedRow
from qrosa.data.store import row_lengths


def step_rows(n_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row numbers of one optimizer step; every row comes once before any comes again.

    Args:
        n_rows: Rows of the data set, above 0.
        batch_size: Rows a step.
        step: Counted from 0.
        seed: Of the order.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_epoch_order(n_rows, place // n_rows, seed)[place % n_rows]) for place in places]


@lru_cache(maxsize=4)
def _epoch_order(n_rows: int, epoch: int, seed: int) -> np.ndarray:
    # RandomState, not default_rng: NumPy promises that its streams never change, so old runs resume under a new NumPy.
    return np.random.RandomState([seed, epoch]).permutation(n_rows)


@dataclass
class MicroBatch:
    """Rows computed at once, padded to the right.

    Attributes:
        input_ids: [B, L] int64.
        attention_mask: [B, L] int64, 1 on the rows' own tokens.
        labels: [B, L] int64, -100 where no loss falls; not shifted.
        row_ids: Which of the rows that were given, [B].
        tokens: Tokens without padding.
        supervised: int64 [S], places in the flat [B * L] whose next token carries loss.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    row_ids: list[int]
    tokens: int = -1
    supervised: torch.Tensor = None  # type: ignore[assignment]  # found in labels unless given

    def __post_init__(self) -> None:
        # Looked at once, while the tensors are on the host: later the host would wait for the whole forward pass.
        if self.tokens < 0:
            self.tokens = int(self.attention_mask.sum())
        if self.supervised is None:
            learnt = torch.zeros_like(self.labels, dtype=torch.bool)
            learnt[:, :-1] = self.labels[:, 1:] != IGNORE
            self.supervised = learnt.flatten().nonzero().squeeze(1)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss once labels are shifted by one."""
        return self.supervised.numel()

    @property
    def padded_tokens(self) -> int:
        """Tokens with padding, B * L: what memory and time depend on."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on a device; the host does not wait for copies to a card."""
        there = torch.device(device)
        return replace(
            self,
            input_ids=_moved(self.input_ids, there),
            attention_mask=_moved(self.attention_mask, there),
            labels=_moved(self.labels, there),
            supervised=_moved(self.supervised, there),
        )


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # of pageable memory a copy waits for all that the card has to do
    return tensor.to(device, non_blocking=True)


def micro_batches(rows: Sequence[EncodedRow], *, max_rows: int, max_tokens: int, pad_id: int) -> list[MicroBatch]:
    """Lay out the rows of one optimizer step, or of an evaluation, longest first.

    Args:
        rows: Every one lands in exactly one micro-batch; ``row_ids`` count in this sequence.
        max_rows: Most rows a micro-batch, at least 1.
        max_tokens: Most tokens a micro-batch, padding included. A row that is longer by itself stands alone.
        pad_id: What fills the padding; any token will do.
    """
    return list(each_micro_batch(rows, max_rows=max_rows, max_tokens=max_tokens, pad_id=pad_id))


def each_micro_batch(
    rows: Sequence[EncodedRow], *, max_rows: int, max_tokens: int, pad_id: int
) -> Iterator[MicroBatch]:
    """As :func:`micro_batches`, one at a time: a whole data set is laid out without being held in memory."""
    lengths = row_lengths(rows)
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    while order:
        count = max(1, min(max_rows, max_tokens // max(1, lengths[order[0]])))
        yield _pad([rows[index] for index in order[:count]], order[:count], pad_id)
        order = order[count:]


def _pad(rows: list[EncodedRow], row_ids: list[int], pad_id: int) -> MicroBatch:
    shape = (len(rows), len(rows[0].input_ids))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for index, row in enumerate(rows):
        size = len(row.input_ids)
        input_ids[index, :size] = torch.tensor(row.input_ids, dtype=torch.int64)
        attention_mask[index, :size] = 1
        labels[index, :size] = torch.tensor(row.labels, dtype=torch.int64)
    return MicroBatch(input_ids, attention_mask, labels, list(row_ids))


@dataclass(frozen=True)
class Limits:
    """The most that is computed at once.

    Attributes:
        rows: Sequences in a micro-batch.
        tokens: Tokens in a micro-batch, padding included; a single longer row still makes a micro-batch.
    """

    rows: int
    tokens: int

    def halved(self) -> Limits:
        """Half of both, and at least one."""
        return Limits(max(1, self.rows // 2), max(1, self.tokens // 2))


def supervised_tokens(row: EncodedRow) -> int:
    """Tokens of a row that carry loss; the first token of a row is never predicted."""
    return len(row.labels) - 1 - row.labels[1:].count(IGNORE)
