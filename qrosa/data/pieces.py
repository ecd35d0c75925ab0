"""Texts to token ids, in pieces cut where learnt text starts.

So the tokens before a completion are exactly those that the model is given when it is asked for it. Tokenising the
whole and reading the boundary off the offsets would not do that: a token may span the boundary (``": "`` + ``"yes"``),
and offsets differ in what they say about spaces. Pieces also serve tokenizers without offsets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers of the SentencePiece kind put a space before whatever they are given; behind this they do not.
_ANCHOR = "\n"


class Pieces:
    """Tokenises many texts at a time, since tokenizers work on batches in parallel."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor_ids = self._find_anchor()

    def of_rows(self, rows: list[list[tuple[int, str]]]) -> list[list[list[int]]]:
        """Token ids of every row's pieces; a piece at position 0 is the start of a text, others continue one."""
        pieces = [piece for row in rows for piece in row]
        heads = iter(self.alone([text for start, text in pieces if start == 0]))
        tails = iter(self.behind([text for start, text in pieces if start > 0]))
        return [[next(tails if start else heads) for start, _ in row] for row in rows]

    def alone(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text by itself, without BOS or EOS."""
        if not texts:
            return []
        batch = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return list(batch["input_ids"])

    def behind(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text as they are behind other text: without the space some tokenizers put in front."""
        if self._anchor_ids is None:
            return self.alone(texts)
        size = len(self._anchor_ids)
        plain = iter(self.alone(texts))
        anchored = self.alone([_ANCHOR + text for text in texts])
        return [ids[size:] if ids[:size] == self._anchor_ids else own for ids, own in zip(anchored, plain, strict=True)]

    def _find_anchor(self) -> list[int] | None:
        """The anchor's tokens if a text is tokenised otherwise at the start than behind it, else None."""
        anchor, alone, behind = self.alone([_ANCHOR, "a", _ANCHOR + "a"])
        differs = behind[: len(anchor)] == anchor and behind[len(anchor) :] != alone
        return anchor if differs else None


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS, if the tokenizer puts it before a text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return tokenizer.bos_token_id if ids[:1] == [tokenizer.bos_token_id] else None
