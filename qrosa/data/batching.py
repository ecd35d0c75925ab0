"""How a step's rows are laid out as tensors; which rows those are, and how they are cut, ``qrosa.data.order`` says.

A loss summed over tokens and divided by the step's supervised tokens does not depend on the cut. Padding is to the
right and known by place (``attention_mask``, label -100), never by the pad token's value.

*Packed*, a micro-batch has no padding: its rows lie end to end as one, positions start over with each of them, and
their lengths tell attention where one ends (``qrosa.model.attention``). Which rows a step takes does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qrosa.data.encode import IGNORE, EncodedRow
from qrosa.data.order import cut
from qrosa.data.store import row_lengths


@dataclass
class MicroBatch:
    """Rows computed at once, padded to the right; or packed, end to end in [1, T].

    Attributes:
        input_ids: [B, L] int64.
        attention_mask: [B, L] int64, 1 on the rows' own tokens.
        labels: [B, L] int64, -100 where no loss falls; not shifted. Packed, no loss falls on the first token of a row,
            which the row before would predict.
        row_ids: Which of the rows that were given.
        tokens: Tokens without padding.
        supervised: int64 [S], places in the flat [B * L] whose next token carries loss.
        lengths: Tokens of each row where they are packed, else None.
        position_ids: [1, T] int64, from 0 in each row, where they are packed, else None.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    row_ids: list[int]
    tokens: int = -1
    supervised: torch.Tensor = None  # type: ignore[assignment]  # found in labels unless given
    lengths: list[int] | None = None
    position_ids: torch.Tensor | None = None

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
            position_ids=None if self.position_ids is None else _moved(self.position_ids, there),
        )


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # of pageable memory a copy waits for all that the card has to do
    return tensor.to(device, non_blocking=True)


def micro_batches(
    rows: Sequence[EncodedRow], *, max_rows: int, max_tokens: int, pad_id: int, packed: bool = False
) -> list[MicroBatch]:
    """Lay out the rows of one optimizer step, or of an evaluation, longest first.

    Args:
        rows: Every one lands in exactly one micro-batch; ``row_ids`` count in this sequence.
        max_rows: Most rows a micro-batch, at least 1.
        max_tokens: Most tokens a micro-batch, padding included. A row that is longer by itself stands alone.
        pad_id: What fills the padding; any token will do.
        packed: Lay rows end to end instead, without padding.
    """
    return list(each_micro_batch(rows, max_rows=max_rows, max_tokens=max_tokens, pad_id=pad_id, packed=packed))


def each_micro_batch(
    rows: Sequence[EncodedRow], *, max_rows: int, max_tokens: int, pad_id: int, packed: bool = False
) -> Iterator[MicroBatch]:
    """As :func:`micro_batches`, one at a time: a whole data set is laid out without being held in memory."""
    for places in cut(row_lengths(rows), max_rows=max_rows, max_tokens=max_tokens, packed=packed):
        chosen = [rows[place] for place in places]
        yield _pack(chosen, places) if packed else _pad(chosen, places, pad_id)


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


def _pack(rows: list[EncodedRow], row_ids: list[int]) -> MicroBatch:
    input_ids = torch.tensor([[token for row in rows for token in row.input_ids]], dtype=torch.int64)
    labels = [label for row in rows for label in (IGNORE, *row.labels[1:])]
    lengths = [len(row.input_ids) for row in rows]
    return MicroBatch(
        input_ids,
        torch.ones_like(input_ids),
        torch.tensor([labels], dtype=torch.int64),
        list(row_ids),
        lengths=lengths,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
    )


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
