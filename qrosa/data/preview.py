"""Encoded rows as text again, with what is learnt told apart: what ``--dry-run`` shows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from qrosa.data.encode import IGNORE, EncodedRow, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview(rows: Iterable[EncodedRow], tokenizer: PreTrainedTokenizerBase, n: int = 3) -> list[list[tuple[str, bool]]]:
    """The first ``n`` rows as text, special tokens visible, cut into (text, carries loss) spans."""
    shown = []
    for row, _ in zip(rows, range(n), strict=False):
        spans, before, end = [], "", 0
        for supervised, run in groupby(row.labels, key=lambda label: label != IGNORE):
            end += len(list(run))
            text = decode(tokenizer, row.input_ids[:end])
            spans.append((text[len(before) :], supervised))
            before = text
        shown.append(spans)
    return shown
