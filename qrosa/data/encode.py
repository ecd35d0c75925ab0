"""Rows to tokens: what the model reads, and which tokens of it are learnt.

**Text.** Where the tokenizer has a chat template, every kind of row but ``text`` goes through it: chat rows as they
are, prompt/completion and Alpaca rows as one user and one assistant turn. Without one, prompt and completion are
joined as they are, Alpaca rows wear Stanford's fixed frame (:data:`ALPACA`), and chat rows are refused.

**Ends.** What ends an answer is learnt: the template's end-of-turn token, or EOS where there is no template or it
writes no such token. EOS is told apart from padding by place, never by value, so PAD == EOS is harmless. A template
writes BOS itself or not at all; other rows start with BOS if the tokenizer adds it, and never with two.

**Boundaries.** The text is tokenised in pieces cut where learnt text starts, so the tokens before a completion are
exactly those that the model is given when it is asked for it. Tokenising the whole and reading the boundary off the
offsets would not do that: a token may span the boundary (``": "`` + ``"yes"``), and offsets differ in what they say
about spaces. Pieces also serve tokenizers without offsets.

The first token of a row is never learnt, since nothing precedes it: ``labels[0]`` is always -100, and supervised
tokens can be counted before or after the shift by one alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from qrosa.data.chat_template import ChatTemplate, Rendered
from qrosa.data.formats import Completion, Conversation, Message, RawRow, Text
from qrosa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# Tokenizers of the SentencePiece kind put a space before whatever they are given; behind this they do not.
_ANCHOR = "\n"


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
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    where: str = "row"
    prompt_len: int | None = None
    answer_end: int | None = None
    turn_end: int | None = None
    skipped_turns: int = 0

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
        return _decode(tokenizer, self.input_ids[self.prompt_len or 0 : self.answer_end])


class Encoder:
    """Encodes rows for one tokenizer; many rows at a time, since tokenizers work on batches in parallel.

    Args:
        tokenizer: Fast or slow, with or without a chat template.
        seq_len: Most tokens a row; what is beyond is cut off its end.
        train_on: ``completion``, or ``all`` to put loss on every token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, train_on: str = "completion") -> None:
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._train_on = train_on
        self._chat = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self._bos = _leading_bos(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._end_ids = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self._spaces: dict[int, bool] = {}
        self._ids: dict[int, int] = {}
        self._anchor_ids = self._find_anchor()

    def encode(self, raws: Sequence[RawRow]) -> list[EncodedRow]:
        """One encoded row for each raw row, in order; rows without a supervised token included.

        Raises:
            InputError: A malformed row, or one that the chat template refuses.
        """
        rendered = [self._render(raw) for raw in raws]
        tokens = self._tokenize_pieces([_cut(row) for row in rendered])
        return [self._assemble(*parts) for parts in zip(raws, rendered, tokens, strict=True)]

    def encode_prompt(self, prompt: str | list[Message]) -> list[int]:
        """The tokens that ask for a completion, exactly as training rows have them before theirs.

        Args:
            prompt: Messages, or a text, which is the only user message where there is a chat template.

        Raises:
            InputError: Messages without a chat template, or messages that the template refuses.
        """
        if isinstance(prompt, str) and self._chat is None:
            ids = self._tokenize([prompt])[0]
            return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._tokenize([self._template("prompt").prompt(Conversation(messages), "prompt")])[0]

    def _render(self, raw: RawRow) -> Rendered:
        example = raw.example()
        if isinstance(example, Text):
            spans = ((0, len(example.text)),) if example.text else ()  # nothing to learn in an empty text
            return Rendered(example.text, spans, add_bos=True, add_eos=True)
        if isinstance(example, Conversation):
            return self._template(raw.where).render(example, raw.where)
        if self._chat is None:
            prompt = _plain_prompt(example)
            text = prompt + example.completion
            return Rendered(text, ((len(prompt), len(text)),), add_bos=True, add_eos=True)
        user, answer = {"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}
        return self._chat.render(Conversation([user, answer], first=1), raw.where)

    def _template(self, where: str) -> ChatTemplate:
        if self._chat is None:
            hint = "use a chat model, or prompt/completion, Alpaca or text rows"
            raise InputError(f"{where}: chat messages, but the model's tokenizer has no chat template", hint)
        return self._chat

    def _assemble(self, raw: RawRow, row: Rendered, tokens: list[list[int]]) -> EncodedRow:
        """Put the pieces' tokens together; ``tokens`` is the head's, then (learnt part, whole piece) a span."""
        ids, *rest = tokens
        spans: list[tuple[int, int]] = []
        for index, (learnt, piece) in enumerate(zip(rest[0::2], rest[1::2], strict=True)):
            if piece[: len(learnt)] != learnt:  # a token spans the end of the learnt part
                stop, following = row.spans[index][1], [*row.spans, (len(row.text), 0)][index + 1][0]
                piece = learnt + self._continuations([row.text[stop:following]])[0]
            spans.append((len(ids), len(ids) + len(learnt)))
            ids = ids + piece
        eos = self._tokenizer.eos_token_id
        if row.add_eos and spans and eos is not None:
            start, end = spans.pop()
            if start == end or ids[-1] != eos:
                ids = [*ids, eos]
            spans.append((start, len(ids)))
        if row.add_bos and self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
            spans = [(start + 1, end + 1) for start, end in spans]
        return self._finish(raw, row, ids, spans)

    def _finish(self, raw: RawRow, row: Rendered, ids: list[int], spans: list[tuple[int, int]]) -> EncodedRow:
        """Cut to length and label."""
        truncated = len(ids) > self._seq_len
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
        return encoded

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
            self._spaces[token] = _decode(self._tokenizer, [token]).isspace()
        return self._spaces[token]

    def _tokenize_pieces(self, rows: list[list[tuple[int, str]]]) -> list[list[list[int]]]:
        """Token ids of every row's pieces; a piece at position 0 is the start of a text, others continue one."""
        pieces = [piece for row in rows for piece in row]
        heads = iter(self._tokenize([text for start, text in pieces if start == 0]))
        tails = iter(self._continuations([text for start, text in pieces if start > 0]))
        return [[next(tails if start else heads) for start, _ in row] for row in rows]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text by itself, without BOS or EOS."""
        if not texts:
            return []
        batch = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        one = self._ids.setdefault  # one object an id, not one a token: a third of the memory
        return [[one(token, token) for token in ids] for ids in batch["input_ids"]]

    def _continuations(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text as they are behind other text: without the space some tokenizers put in front."""
        if self._anchor_ids is None:
            return self._tokenize(texts)
        size = len(self._anchor_ids)
        plain = iter(self._tokenize(texts))
        anchored = self._tokenize([_ANCHOR + text for text in texts])
        return [ids[size:] if ids[:size] == self._anchor_ids else own for ids, own in zip(anchored, plain, strict=True)]

    def _find_anchor(self) -> list[int] | None:
        """The anchor's tokens if a text is tokenised otherwise at the start than behind it, else None."""
        anchor, alone, behind = self._tokenize([_ANCHOR, "a", _ANCHOR + "a"])
        differs = behind[: len(anchor)] == anchor and behind[len(anchor) :] != alone
        return anchor if differs else None


def encode(
    raw: RawRow, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, train_on: str = "completion"
) -> EncodedRow:
    """Encode one row; for many, an :class:`Encoder` is faster. See there for the arguments and errors."""
    return Encoder(tokenizer, seq_len=seq_len, train_on=train_on).encode([raw])[0]


def encode_prompt(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that ask for a completion; see :meth:`Encoder.encode_prompt`."""
    return Encoder(tokenizer, seq_len=1).encode_prompt(prompt)


def preview(rows: Iterable[EncodedRow], tokenizer: PreTrainedTokenizerBase, n: int = 3) -> list[list[tuple[str, bool]]]:
    """The first ``n`` rows as text, special tokens visible, cut into (text, carries loss) spans."""
    shown = []
    for row, _ in zip(rows, range(n), strict=False):
        spans, before, end = [], "", 0
        for supervised, run in groupby(row.labels, key=lambda label: label != IGNORE):
            end += len(list(run))
            text = _decode(tokenizer, row.input_ids[:end])
            spans.append((text[len(before) :], supervised))
            before = text
        shown.append(spans)
    return shown


def _cut(row: Rendered) -> list[tuple[int, str]]:
    """Pieces with their position: the text before the first span; then each span alone, and through to the next."""
    if not row.spans:
        return [(0, row.text)]
    starts = [start for start, _ in row.spans]
    pieces = [(0, row.text[: starts[0]])]
    for (start, end), following in zip(row.spans, [*starts[1:], len(row.text)], strict=True):
        pieces += [(start, row.text[start:end]), (start, row.text[start:following])]
    return pieces


def _plain_prompt(example: Completion) -> str:
    if example.alpaca is None:
        return example.prompt
    instruction, extra = example.alpaca
    frame = ALPACA_WITH_INPUT if extra.strip() else ALPACA
    return frame.format(instruction=instruction, input=extra)


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS, if the tokenizer puts it before a text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return tokenizer.bos_token_id if ids[:1] == [tokenizer.bos_token_id] else None


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
