"""A data set in memory: encoded rows, and a report of what became of the rows that were read.

Rows that cannot teach anything - no supervised token is left after the cut to ``seq_len``, or there was none - are
dropped and counted. A data set without a single supervised token would train nothing without anybody noticing
(a chat template without an assistant part, prompts longer than ``seq_len``), so it is an error that says why.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qrosa.data.encode import EncodedRow, Encoder
from qrosa.data.formats import RawRow, read_rows
from qrosa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # rows tokenised at once: enough to keep the tokenizer's threads busy


@dataclass(frozen=True)
class DataReport:
    """What a data set holds, and what was lost on the way.

    Attributes:
        rows: Rows kept.
        truncated: Rows kept that were cut to ``seq_len``.
        dropped: Rows left out because no supervised token was left in them.
        tokens: Tokens of the rows kept.
        supervised_tokens: Those that carry loss.
        longest: Tokens of the longest row.
        kind: Kind of the rows, a key of :data:`qrosa.data.formats.KINDS`.
        skipped_turns: Assistant turns of the rows kept without loss, because the chat template rewrites them.
    """

    rows: int
    truncated: int
    dropped: int
    tokens: int
    supervised_tokens: int
    longest: int
    kind: str
    skipped_turns: int = 0


@dataclass(frozen=True)
class Dataset:
    """Encoded rows in the order of their source."""

    rows: list[EncodedRow]
    report: DataReport

    @classmethod
    def from_rows(cls, rows: list[EncodedRow], kind: str, dropped: int = 0) -> Dataset:
        """A data set of these rows, counted."""
        report = DataReport(
            rows=len(rows),
            truncated=sum(row.truncated for row in rows),
            dropped=dropped,
            tokens=sum(len(row.input_ids) for row in rows),
            supervised_tokens=sum(row.supervised_tokens for row in rows),
            longest=max((len(row.input_ids) for row in rows), default=0),
            kind=kind,
            skipped_turns=sum(row.skipped_turns for row in rows),
        )
        return cls(rows, report)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.input_ids) for row in self.rows]

    def fingerprint(self) -> str:
        """SHA-256 over all token ids and labels, hex; a resumed run must find the same."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(np.array([len(row.input_ids), *row.input_ids, *row.labels], dtype="<i4").tobytes())
        return digest.hexdigest()

    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """Hold out a share of the rows, drawn by seed: (the rest, the held-out rows), both in source order.

        At least one row is held out, however small the share.

        Raises:
            InputError: One of the two would have no row.
        """
        held_out = max(1, round(share * len(self.rows)))
        if not 0 < share < 1 or held_out >= len(self.rows):
            message = f"holding out {share:.3g} of {len(self.rows)} rows leaves none on one side"
            raise InputError(message, "use a share such as 5%, and more rows, or give --eval-data")
        chosen = set(random.Random(seed).sample(range(len(self.rows)), held_out))
        rest = [row for index, row in enumerate(self.rows) if index not in chosen]
        kept = [self.rows[index] for index in sorted(chosen)]
        kind, dropped = self.report.kind, self.report.dropped
        return Dataset.from_rows(rest, kind, dropped), Dataset.from_rows(kept, kind)


def load_rows(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    train_on: str = "completion",
    limit: int | None = None,
    split: str = "train",
) -> Dataset:
    """Read, encode and count the rows of a file, folder or ``datasets`` id.

    Args:
        source: See :func:`qrosa.data.formats.read_rows`.
        tokenizer: The model's.
        seq_len: Most tokens a row.
        train_on: ``completion`` or ``all``.
        limit: Read this many rows at most.
        split: Which of a folder's or hub data set's splits.

    Raises:
        InputError: A missing source, a malformed row, no rows, or no supervised token in any of them.
        StorageError: A file cannot be read.
    """
    encoder = Encoder(tokenizer, seq_len=seq_len, train_on=train_on)
    kind = ""
    kept: list[EncodedRow] = []
    lost: list[EncodedRow] = []
    for chunk in _chunks(islice(read_rows(source, split=split), limit)):
        kind = kind or chunk[0].kind
        for row in encoder.encode(chunk):
            (kept if row.supervised_tokens else lost).append(row)
    if not kept:
        raise _nothing_to_learn(source, lost, seq_len)
    return Dataset.from_rows(kept, kind, dropped=len(lost))


def _chunks(raws: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    iterator = iter(raws)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _nothing_to_learn(source: str | Path, lost: list[EncodedRow], seq_len: int) -> InputError:
    """Why no row has a supervised token, by the cause most rows share."""
    cut, skipped = sum(row.truncated for row in lost), sum(row.skipped_turns > 0 for row in lost)
    what = f"{source}: none of {len(lost)} rows has a token to learn"
    if 2 * cut >= len(lost) > 0:
        return InputError(f"{what}: their prompts alone fill {seq_len} tokens", "raise --seq-len, or shorten prompts")
    if 2 * skipped >= len(lost) > 0:
        message = f"{what}: the chat template rewrites what the assistant said"
        return InputError(message, "use prompt/completion rows, a template with {% generation %}, or --train-on all")
    return InputError(f"{what}: they hold no answer", "give every row an assistant turn, a completion or a text")
