"""A data set: encoded rows, and a report of what became of the rows that were read.

Rows that cannot teach anything - no supervised token is left after the cut to ``seq_len``, or there was none - are
dropped and counted. A data set without a single supervised token would train nothing without anybody noticing
(a chat template without an assistant part, prompts longer than ``seq_len``), so it is an error that says why.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qrosa.data.encode import EncodedRow
from qrosa.data.loading import Loader
from qrosa.data.notes import Note, block
from qrosa.data.store import Rows
from qrosa.errors import InputError
from qrosa.eval.objectives import Answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


EVAL_SPLITS = ("test", "validation")
"""Splits of a folder or data set that rows to evaluate on come from, where no other was asked for; best first."""

_MUCH = 0.1  # of the rows: from here on what is lost is a warning
_FILES = 4  # names of files in one line


@dataclass(frozen=True)
class DataReport:
    """What a data set holds, and what was lost on the way.

    Attributes:
        rows: Rows kept; a long text counts once for each of its pieces.
        truncated: Rows kept that were cut to ``seq_len``.
        dropped: Rows left out because no supervised token was left in them.
        tokens: Tokens of the rows kept.
        supervised_tokens: Those that carry loss.
        longest: Tokens of the longest row.
        kind: Kind of the rows, a key of :data:`qrosa.data.columns.KINDS`, or several with commas.
        skipped_turns: Assistant turns of the rows kept without loss, because the chat template rewrites them.
        read: Rows as they stand in the data.
        files: What was read.
        unused: What is not used as it stands in the data.
        ends: Tokens that end a learnt answer.
        unwanted: Rows kept whose answer is to be unlearnt.
    """

    rows: int
    truncated: int
    dropped: int
    tokens: int
    supervised_tokens: int
    longest: int
    kind: str
    skipped_turns: int = 0
    read: int = 0
    files: tuple[str, ...] = ()
    unused: tuple[Note, ...] = ()
    ends: tuple[int, ...] = ()
    unwanted: int = 0

    def told(self, name: str) -> str:
        """What is not used as it stands in the data, as a block of text; empty where there is nothing to tell.

        Args:
            name: What the rows are called, such as ``training rows``.
        """
        if not self.unused:
            return ""
        lost = (self.dropped + self.truncated) / max(1, self.read)
        title = f"of the {name}, this is not used as it stands"
        if lost > _MUCH:
            title = f"WARNING: {lost:.0%} of the {name} are cut or dropped; {title}"
        names = ", ".join(self.files[:_FILES]) + (f" and {len(self.files) - _FILES} more" * (len(self.files) > _FILES))
        return "\n".join([f"{title} (read: {names}):", *block(self.unused)])


@dataclass(frozen=True)
class Dataset:
    """Encoded rows in the order of their source."""

    rows: Rows
    report: DataReport
    answers: Answers = "single"

    @property
    def group(self) -> int:
        """Rows that belong together, one behind the other: 2 where each is a chosen and a rejected answer."""
        return 2 if self.answers == "pairs" else 1

    @property
    def examples(self) -> int:
        """Rows, or pairs of them."""
        return len(self.rows) // self.group

    @property
    def wanted(self) -> Rows:
        """The rows that are to become likelier: all, the chosen answers, or the wanted ones."""
        if self.answers == "judged":
            return self.rows.pick([place for place, row in enumerate(self.rows) if row.wanted])
        return self.rows if self.group == 1 else self.rows.pick(range(0, len(self.rows), self.group))

    @classmethod
    def from_rows(cls, rows: Iterable[EncodedRow], kind: str, dropped: int = 0, answers: Answers = "single") -> Dataset:
        """A data set of these rows, counted."""
        kept = rows if isinstance(rows, Rows) else Rows.of(rows)
        truncated = skipped = unwanted = 0
        for row in kept:
            truncated, skipped = truncated + row.truncated, skipped + row.skipped_turns
            unwanted += not row.wanted
        report = DataReport(
            rows=len(kept),
            truncated=truncated,
            dropped=dropped,
            tokens=int(kept.lengths.sum(dtype=np.int64)),
            supervised_tokens=int(kept.supervised.sum(dtype=np.int64)),
            longest=int(kept.lengths.max(initial=0)),
            kind=kind,
            skipped_turns=skipped,
            read=len(kept) // (2 if answers == "pairs" else 1) + dropped,
            unwanted=unwanted,
        )
        return cls(kept, report, answers)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return list(self.rows.lengths.tolist())

    def fingerprint(self) -> str:
        """SHA-256 over all token ids, labels and marks of unwanted answers, hex; a resumed run must find the same."""
        digest = hashlib.sha256()
        for row in self.rows:
            mark = () if row.wanted else (-1,)
            digest.update(np.array([len(row.input_ids), *row.input_ids, *row.labels, *mark], dtype="<i4").tobytes())
        return digest.hexdigest()

    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """Hold out a share of the rows, drawn by seed: (the rest, the held-out rows), both in source order.

        At least one row is held out, however small the share. What the report tells of the source stays with the rest.

        Raises:
            InputError: One of the two would have no row.
        """
        held_out = max(1, round(share * self.examples))
        if not 0 < share < 1 or held_out >= self.examples:
            message = f"holding out {share:.3g} of {self.examples} rows leaves none on one side"
            raise InputError(message, "use a share such as 5%, and more rows, or give --eval-data")
        chosen = set(random.Random(seed).sample(range(self.examples), held_out))
        rest = self.rows.pick([index for index in range(len(self.rows)) if index // self.group not in chosen])
        kept = self.rows.pick([index for index in range(len(self.rows)) if index // self.group in chosen])
        whole = self.report
        parts = (
            Dataset.from_rows(rest, whole.kind, whole.dropped, self.answers),
            Dataset.from_rows(kept, whole.kind, answers=self.answers),
        )
        told = replace(parts[0].report, read=whole.read, files=whole.files, unused=whole.unused, ends=whole.ends)
        return Dataset(parts[0].rows, told, self.answers), parts[1]


def load_rows(
    source: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    train_on: str = "completion",
    limit: int | None = None,
    split: str | Sequence[str] = "train",
    columns: str | None = None,
    vocabulary: int | None = None,
    seed: int = 42,
    answers: Answers = "single",
) -> Dataset:
    """Read, encode and count the rows of files, folders or ``datasets`` ids.

    Args:
        source: One source or several, each with a share of its rows where not all are wanted; see
            :class:`qrosa.data.sources.Source`.
        tokenizer: The model's.
        seq_len: Most tokens a row.
        train_on: ``completion``, ``last`` or ``all``.
        limit: Read this many rows of each source at most.
        split: Which of a folder's or hub data set's splits; of several, the first that is there.
        columns: What the columns are called; see :class:`qrosa.data.columns.Columns`.
        vocabulary: Rows of the model's embedding, if they are known.
        seed: Of the choice of rows where a share is taken.
        answers: How answers stand in the data; a pair becomes two rows, the chosen answer's and the rejected one's.

    Raises:
        InputError: A missing source, a malformed row, no rows, or no supervised token in any of them; answers to
            compare whose prompts are to be learnt.
        StorageError: A file cannot be read.
    """
    if answers != "single" and train_on == "all":
        raise InputError("this --objective compares answers, and --train-on all adds prompts", "leave --train-on out")
    loader = Loader(tokenizer, seq_len, train_on, vocabulary, answers)
    sources = (source,) if isinstance(source, (str, Path)) else tuple(source)
    for number, one in enumerate(sources):
        loader.load(str(one), number=number, split=split, columns=columns, limit=limit, seed=seed)
    rows = loader.rows(", ".join(map(str, sources)))
    counted = Dataset.from_rows(rows, ", ".join(loader.kinds), loader.dropped, answers)
    report = replace(
        counted.report,
        read=loader.read,
        files=tuple(loader.files),
        unused=loader.notes.all(),
        ends=tuple(sorted(loader.encoder.ends)),
    )
    return Dataset(rows, report, answers)
