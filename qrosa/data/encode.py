"""Rows to tokens: what the model reads, and which tokens of it are learnt. :mod:`qrosa.data.row_text` writes the text,
:mod:`qrosa.data.pieces` cuts it.

**Ends.** What ends an answer is learnt: the template's end-of-turn token, or EOS where there is no template or it
writes no such token. EOS is told apart from padding by place, never by value, so PAD == EOS is harmless. A template
writes BOS itself or not at all; other rows start with BOS if the tokenizer adds it, and never with two.

**Length.** A row of ``text`` that is longer than ``seq_len`` becomes several, each token in exactly one of them. Other
rows are cut at their end, since an answer without its question teaches nothing; what is lost is noted.

The first token of a row is never learnt, since nothing precedes it: ``labels[0]`` is always -100, and supervised
tokens can be counted before or after the shift by one alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qrosa.data.formats import Conversation, RawRow
from qrosa.data.messages import Message
from qrosa.data.notes import Notes
from qrosa.data.pieces import Pieces, leading_bos
from qrosa.data.rendering import Rendered
from qrosa.data.row_text import RowText
from qrosa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


@dataclass
class EncodedRow:
    """One row as the model reads it.

    Attributes:
        input_ids: All tokens, at most ``seq_len``.
        labels: The same where loss falls, else -100; as long as ``input_ids``, not shifted.
        truncated: Whether tokens were cut off its end.
        where: Where the row stands, for messages.
        prompt_len: Tokens before the last completion (the last assistant turn, in a chat); None for ``text`` rows.
        answer_end: Where the last completion's text ends, before the tokens that end the turn.
        turn_end: Where the last completion ends, with those tokens.
        skipped_turns: Assistant turns without loss because the template rewrites them (see ``chat_template.py``).
        wanted: False for an answer that is to be unlearnt.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    where: str = "row"
    prompt_len: int | None = None
    answer_end: int | None = None
    turn_end: int | None = None
    skipped_turns: int = 0
    wanted: bool = True

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss."""
        return len(self.labels) - self.labels.count(IGNORE)

    def prompt_ids(self) -> list[int]:
        """What the model is given before the last completion; empty for ``text`` rows."""
        return self.input_ids[: self.prompt_len or 0]

    def completion_ids(self) -> list[int]:
        """The last completion with the tokens that end it."""
        return self.input_ids[self.prompt_len or 0 : self.turn_end]

    def completion_text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The last completion as text, without the tokens that end it."""
        return decode(tokenizer, self.input_ids[self.prompt_len or 0 : self.answer_end])


class Encoder:
    """Encodes rows for one tokenizer; many rows at a time, since tokenizers work on batches in parallel.

    Args:
        tokenizer: Fast or slow, with or without a chat template.
        seq_len: Most tokens a row.
        train_on: ``completion``, ``last`` for the last answer of each row only, or ``all`` to put loss on every token.
        notes: Takes what is lost on the way: cut rows and answers, turns that cannot be learnt, empty answers.
        vocabulary: Rows of the model's embedding; token ids beyond it are refused. None where they are not known.

    Attributes:
        ends: Tokens that ended a learnt answer so far.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq_len: int,
        train_on: str = "completion",
        notes: Notes | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._train_on = train_on
        self._notes = Notes() if notes is None else notes
        self._vocabulary = vocabulary
        self._text = RowText(tokenizer, train_on, self._notes)
        self._bos = leading_bos(tokenizer)
        self._spaces: dict[int, bool] = {}
        self._pieces = Pieces(tokenizer)
        self._end_ids = self._find_ends()
        self.ends: set[int] = set()

    def encode(self, raws: Sequence[RawRow]) -> list[EncodedRow]:
        """The encoded rows, in order; rows without a supervised token included. Long texts become several rows.

        Raises:
            InputError: A malformed row, one that the chat template refuses, or a token beyond the vocabulary.
        """
        rendered = [self._text.render(raw) for raw in raws]
        tokens = self._pieces.of_rows([_cut(row) for row in rendered])
        return [row for parts in zip(raws, rendered, tokens, strict=True) for row in self._assemble(*parts)]

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that may end an answer: EOS, and those that the template writes behind one."""
        return frozenset(self._end_ids)

    def encode_prompt(self, prompt: str | list[Message]) -> list[int]:
        """The tokens that ask for a completion, exactly as training rows have them before theirs.

        Args:
            prompt: Messages, or a text, which is the only user message where there is a chat template.

        Raises:
            InputError: Messages without a chat template, or messages that the template refuses.
        """
        if isinstance(prompt, str) and self._text.chat is None:
            ids = self._pieces.alone([prompt])[0]
            return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._pieces.alone([self._text.template("prompt").prompt(Conversation(messages), "prompt")])[0]

    def _assemble(self, raw: RawRow, row: Rendered, tokens: list[list[int]]) -> list[EncodedRow]:
        """Put the pieces' tokens together; ``tokens`` is the head's, then (learnt part, whole piece) a span."""
        ids, *rest = tokens
        spans: list[tuple[int, int]] = []
        for index, (learnt, piece) in enumerate(zip(rest[0::2], rest[1::2], strict=True)):
            if piece[: len(learnt)] != learnt:  # a token spans the end of the learnt part
                stop, following = row.spans[index][1], [*row.spans, (len(row.text), 0)][index + 1][0]
                piece = learnt + self._pieces.behind([row.text[stop:following]])[0]
            spans.append((len(ids), len(ids) + len(learnt)))
            ids = ids + piece
        if row.add_eos and spans:
            ids, spans = self._with_eos(raw, ids, spans)
        if row.add_bos and self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
            spans = [(start + 1, end + 1) for start, end in spans]
        self._check_ids(raw, ids)
        if raw.kind == "text" and len(ids) > self._seq_len:
            return self._in_pieces(raw, ids)
        return [self._finish(raw, row, ids, spans)]

    def _with_eos(
        self, raw: RawRow, ids: list[int], spans: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """EOS behind the last learnt part, once."""
        eos = self._tokenizer.eos_token_id
        start, end = spans[-1]
        if eos is not None:
            if start == end or ids[-1] != eos:
                ids = [*ids, eos]
            return ids, [*spans[:-1], (start, len(ids))]
        if raw.kind != "text":
            message = f"{raw.where}: no token ends an answer: neither the tokenizer nor the model's configs name one"
            raise InputError(message, "set eos_token in tokenizer_config.json, or eos_token_id in config.json")
        self._notes.add("ends of texts", "neither the tokenizer nor the model's configs name an end token", raw.where)
        return ids, spans

    def _check_ids(self, raw: RawRow, ids: list[int]) -> None:
        if self._vocabulary is None or not ids or max(ids) < self._vocabulary:
            return
        wrong = next(token for token in ids if token >= self._vocabulary)
        text = self._tokenizer.convert_ids_to_tokens(wrong)
        message = f"{raw.where}: token {text!r} has id {wrong}, and the model knows {self._vocabulary} tokens"
        raise InputError(message, "use the tokenizer that came with the model; new tokens cannot be trained here")

    def _in_pieces(self, raw: RawRow, ids: list[int]) -> list[EncodedRow]:
        """A long text as rows of ``seq_len`` tokens; the last has two at least, since a row's first is not learnt."""
        starts = list(range(0, len(ids), self._seq_len))
        if len(ids) - starts[-1] == 1:
            starts[-1] -= 1
        rows = []
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(ids)], strict=True), start=1):
            piece = ids[start:end]
            rows.append(EncodedRow(piece, [IGNORE, *piece[1:]], where=f"{raw.where}, piece {number}"))
        why = f"they are longer than --seq-len {self._seq_len}, and every token is in one piece"
        self._notes.add("texts in pieces", why, raw.where)
        return rows

    def _finish(self, raw: RawRow, row: Rendered, ids: list[int], spans: list[tuple[int, int]]) -> EncodedRow:
        """Cut to length and label."""
        truncated = len(ids) > self._seq_len
        if truncated:
            self._note_cut(raw, len(ids), spans)
        ids = ids[: self._seq_len]
        spans = [(start, min(end, len(ids))) for start, end in spans if start < len(ids)]
        if self._train_on == "all":
            labels = list(ids)
        else:
            labels = [IGNORE] * len(ids)
            for start, end in spans:
                labels[start:end] = ids[start:end]
        labels[:1] = [IGNORE] * len(ids[:1])
        encoded = EncodedRow(ids, labels, truncated, raw.where, skipped_turns=row.skipped)
        if raw.kind != "text":
            start, end = spans[-1] if spans else (len(ids), len(ids))
            encoded.prompt_len, encoded.turn_end = start, end
            encoded.answer_end = self._answer_end(ids, start, end)
        if not truncated:
            self.ends.update(
                ids[self._answer_end(ids, start, end)] for start, end in spans if ids[end - 1] in self._end_ids
            )
        return encoded

    def _note_cut(self, raw: RawRow, size: int, spans: list[tuple[int, int]]) -> None:
        limit = self._seq_len
        why = f"they are longer than --seq-len {limit}"
        self._notes.add("rows cut", why, raw.where)
        self._notes.add("tokens cut off", why, raw.where, count=size - limit, unit="tokens")
        for name, lost in (
            ("answers cut short", sum(start < limit < end for start, end in spans)),
            ("answers cut off", sum(start >= limit for start, _ in spans)),
        ):
            if lost:
                self._notes.add(name, why, raw.where, count=lost, unit="turns")

    def _answer_end(self, ids: list[int], start: int, end: int) -> int:
        """Where the tokens that end a turn begin; there may be white space between them (Phi-3)."""
        at = end
        while at > start and (ids[at - 1] in self._end_ids or self._is_space(ids[at - 1])):
            at -= 1
            if ids[at] in self._end_ids:
                end = at
        return end

    def _is_space(self, token: int) -> bool:
        if token not in self._spaces:
            self._spaces[token] = decode(self._tokenizer, [token]).isspace()
        return self._spaces[token]

    def _find_ends(self) -> set[int]:
        """Tokens that may end an answer: EOS, and those that the template writes behind one.

        Not every special token: some models answer with one.
        """
        ends = set() if self._tokenizer.eos_token_id is None else {int(self._tokenizer.eos_token_id)}
        closing = "" if self._text.chat is None else self._text.chat.closing
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        return ends | {token for token in self._pieces.behind([closing])[0] if token in special}


def encode(
    raw: RawRow, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, train_on: str = "completion"
) -> EncodedRow:
    """Encode one row; for many, an :class:`Encoder` is faster. See there for the arguments and errors."""
    return Encoder(tokenizer, seq_len=seq_len, train_on=train_on).encode([raw])[0]


def encode_prompt(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that ask for a completion; see :meth:`Encoder.encode_prompt`."""
    return Encoder(tokenizer, seq_len=1).encode_prompt(prompt)


def _cut(row: Rendered) -> list[tuple[int, str]]:
    """Pieces with their position: the text before the first span; then each span alone, and through to the next."""
    if not row.spans:
        return [(0, row.text)]
    starts = [start for start, _ in row.spans]
    pieces = [(0, row.text[: starts[0]])]
    for (start, end), following in zip(row.spans, [*starts[1:], len(row.text)], strict=True):
        pieces += [(start, row.text[start:end]), (start, row.text[start:following])]
    return pieces


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of token ids, special tokens visible, spaces as they are."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
