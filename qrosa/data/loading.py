"""Reads sources one after the other, encodes their rows a block at a time, and keeps those that can teach something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from qrosa.data.columns import COMPARED, KINDS, Columns
from qrosa.data.compared import is_wanted, split_pair
from qrosa.data.encode import EncodedRow, Encoder
from qrosa.data.formats import RawRow, read_rows
from qrosa.data.notes import Notes
from qrosa.data.sources import Draw, Source
from qrosa.data.store import Rows, RowWriter
from qrosa.errors import InputError
from qrosa.eval.objectives import Answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK = 1024  # rows tokenised at once: enough to keep the tokenizer's threads busy

_LEARNT = {"preference": "preferences are learnt from", "judged": "kto learns from"}


@dataclass(frozen=True)
class _Loss:
    """Why a row is dropped: in words, and what to do when that is why all are."""

    why: str
    hint: str


_CUT = _Loss("their prompts alone fill {seq_len} tokens", "raise --seq-len, or shorten prompts")
_REWRITTEN = _Loss(
    "the chat template rewrites what the assistant said",
    "give a template that keeps it with --chat-template, such as the model's own for training",
)
_NO_ANSWER = _Loss("they hold no answer", "give every row an assistant turn, a completion or a text")


class Loader:
    """Collects the encoded rows of several sources.

    Args:
        tokenizer: The model's.
        seq_len: Most tokens a row.
        train_on: ``completion``, ``last`` or ``all``.
        vocabulary: Rows of the model's embedding, if they are known.
        answers: How answers stand in the data; of a pair come two rows, the chosen answer's and the rejected one's.

    Attributes:
        notes: What is not used as it stands in the data.
        encoder: What made tokens of the rows.
        files: What was read.
        kinds: Kinds of rows, in the order in which they came.
        read: Rows as they stand in the data, those of a share that is not taken included.
        dropped: Rows left out because they have no supervised token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        train_on: str,
        vocabulary: int | None = None,
        answers: Answers = "single",
    ) -> None:
        self.notes = Notes()
        self.encoder = Encoder(tokenizer, seq_len=seq_len, train_on=train_on, notes=self.notes, vocabulary=vocabulary)
        self.files: list[str] = []
        self.kinds: list[str] = []
        self.read = 0
        self._seq_len = seq_len
        self._answers: Answers = answers
        self._writer = RowWriter()
        self._kept = 0
        self._losses: Counter[_Loss] = Counter()

    @property
    def dropped(self) -> int:
        """Rows left out because they have no supervised token."""
        return self._losses.total()

    def load(
        self,
        name: str,
        *,
        number: int,
        split: str | Sequence[str],
        columns: str | None,
        limit: int | None,
        seed: int,
    ) -> None:
        """Read and encode one source.

        Args:
            name: The source, with a share where not all of its rows are wanted.
            number: Its place among the sources, on which the choice of a share depends beside the seed.
            split: Which of a folder's splits.
            columns: What the columns are called.
            limit: Read this many rows at most.
            seed: Of the choice of a share.

        Raises:
            InputError: A missing source, a malformed row, or no rows.
            StorageError: A file cannot be read, or the encoded rows not be written.
        """
        source = Source.parse(name)
        draw = Draw(source.share, (seed, number))
        raws = read_rows(
            source.name,
            split=split,
            columns=Columns(columns),
            notes=self.notes,
            files=self.files,
            answers=self._answers,
        )
        for block in _blocks(islice(raws, limit)):
            self.read += len(block)
            self._check_kind(block[0])
            if block[0].kind not in self.kinds:
                self.kinds.append(block[0].kind)
            taken = block
            if source.share < 1:
                taken = [block[place] for place in draw.places(len(block))]
                left = len(block) - len(taken)
                why = f"a share of {source.share:g} is taken"
                if left:
                    self.notes.add(f"rows of {source.name}", why, block[0].where, count=left)
            self._encode(taken)

    def _encode(self, raws: Sequence[RawRow]) -> None:
        """Encode rows and keep them, both of a pair or none."""
        if self._answers == "pairs":
            halves = self.encoder.encode([half for raw in raws for half in split_pair(raw)])
            for pair in zip(halves[::2], halves[1::2], strict=True):
                self._take(*pair)
        elif self._answers == "judged":
            for raw, row in zip(raws, self.encoder.encode(raws), strict=True):
                row.wanted = is_wanted(raw)
                self._take(row)
        else:
            for row in self.encoder.encode(raws):
                self._take(row)

    def rows(self, name: str) -> Rows:
        """All rows that were kept.

        Args:
            name: What the sources are called, for the error.

        Raises:
            InputError: None was, by the cause that most rows share.
        """
        if not self._kept:
            what = f"{name}: none of {self.dropped} rows has a token to learn"
            loss = self._losses.most_common(1)[0][0] if self._losses else _NO_ANSWER
            raise InputError(f"{what}: {loss.why.format(seq_len=self._seq_len)}", loss.hint)
        return self._writer.close()

    def _check_kind(self, raw: RawRow) -> None:
        asked = COMPARED.get(self._answers)
        if raw.kind == asked or (asked is None and raw.kind not in COMPARED.values()):
            return
        if asked is not None:
            keys = KINDS[asked]
            raise InputError(
                f"{raw.where} is a {raw.kind} row, and {_LEARNT[asked]} {', '.join(keys[:-1])} and {keys[-1]}",
                f"give such rows; or --columns {keys[-1]}=...; or another --objective",
            )
        raise InputError(
            f"{raw.where} is a preference, and one answer alone is not what it says",
            "to compare both: --objective dpo or orpo; to take one: --columns prompt=prompt,completion=chosen",
        )

    def _take(self, *rows: EncodedRow) -> None:
        """Keep a row, or both of a pair, where each can teach something."""
        row = next((row for row in rows if not row.supervised_tokens), None)
        if row is None:
            for one in rows:
                self._writer.append(one)
            self._kept += 1
            return
        loss = _CUT if row.truncated else _REWRITTEN if row.skipped_turns else _NO_ANSWER
        self._losses[loss] += 1
        self.notes.add("rows dropped", loss.why.format(seq_len=self._seq_len), row.where)


def _blocks(raws: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    iterator = iter(raws)
    while block := list(islice(iterator, _BLOCK)):
        yield block
