"""Accuracy on rows whose completion is one of a few labels: by likelihood, and by greedy generation.

The labels are the distinct completions of the rows themselves. Everything starts from one pass over the prompts: rows
are batched by length and padded on the left, so that all of them end at the same position, and the cache of that pass
is shared by all that follows, which only computes a few tokens a row:

- *accuracy*: the label with the highest summed log-probability after the prompt. The tokens that end the turn are left
  out, unless one label is the beginning of another and only the end tells them apart. Labels of one token then need
  no pass at all: they are read off the prompt's last position;
- *exact match*: the text generated greedily, up to two tokens longer than the longest label, equals the completion's;
- *loss*: the row's own completion, teacher-forced, where loss falls on nothing else (not with ``--train-on all``).

A cache cannot be rewound for every architecture (sliding windows forget), so it is forked instead. The caches of plain
and sliding-window attention replace their tensors and never write into them, which makes a fork free; others are
copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from qrosa.data.encode import EncodedRow
from qrosa.eval.generate import end_tokens, padding_token
from qrosa.eval.perplexity import MAX_ROWS, MAX_TOKENS, evaluate_loss, loss_result
from qrosa.model.head import decoder_output, evaluating, head_logits, model_device, token_log_probs

MAX_LABELS = 64
MAX_LABEL_TOKENS = 32
_EXTRA_TOKENS = 2

Tokens = tuple[int, ...]


class TaskResult(TypedDict):
    """What `evaluate_tasks` measures; accuracy and exact match are None where rows have no short completion."""

    rows: int
    supervised_tokens: int
    loss: float
    perplexity: float
    accuracy: float | None
    exact_match: float | None


@dataclass(frozen=True)
class LabelSet:
    """The distinct completions of a set of rows, in order of first appearance.

    Attributes:
        answers: Their tokens, without those that end the turn.
        scored: What the likelihood is taken of: the answers, or the whole completions.
        longest: Tokens of the longest whole completion.
        ends: Tokens that end a turn.
    """

    answers: tuple[Tokens, ...]
    scored: tuple[Tokens, ...]
    longest: int
    ends: frozenset[int]


@dataclass
class _Prompted:
    """A batch of prompts after its pass: the cache, its mask [B, P], true lengths [B], last hidden state [B, d]."""

    cache: Any
    mask: Tensor
    lengths: Tensor
    last: Tensor


@dataclass
class _Tally:
    rows: int = 0
    tokens: int = 0
    loss: float = 0.0
    right: int = 0
    exact: int = 0


def find_labels(rows: Sequence[EncodedRow]) -> LabelSet | None:
    """The rows' label set, or None when they have none: 2 to 64 distinct completions of at most 32 tokens each."""
    found: dict[Tokens, Tokens] = {}
    for row in rows:
        answer, whole = _answer(row), _completion(row)
        if not answer or len(whole) > MAX_LABEL_TOKENS:
            return None
        found[answer] = max(whole, found.get(answer, ()), key=len)
        if len(found) > MAX_LABELS:
            return None
    if len(found) < 2:
        return None
    answers, wholes = tuple(found), tuple(found.values())
    nested = any(a != b and b[: len(a)] == a for a in answers for b in answers)
    ends = frozenset(whole[len(answer)] for answer, whole in found.items() if len(whole) > len(answer))
    return LabelSet(answers, wholes if nested else answers, max(map(len, wholes)), ends)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[EncodedRow],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Loss of `rows`, and accuracy and exact match where they have a label set.

    Args:
        model: A transformers causal language model; its training mode is kept.
        tokenizer: Its tokenizer.
        rows: Encoded rows.
        max_tokens: Most prompt tokens, padding included, that are computed at once.
        progress: Called with the rows done and all rows.

    Raises:
        InputError: No row has a supervised token.
    """
    labels = find_labels(rows)
    if labels is None:
        pad_id = padding_token(model, tokenizer)
        result = evaluate_loss(model, rows, max_tokens=max_tokens, pad_id=pad_id, progress=progress)
        return {**result, "accuracy": None, "exact_match": None}
    shared = all(_loss_is_on_completion(row) for row in rows)
    tally = _Tally()
    with evaluating(model):
        for batch in _batches(rows, max_tokens):
            _score_batch(model, tokenizer, batch, labels, tally)
            if progress is not None:
                progress(tally.rows, len(rows))
    loss = (
        loss_result(tally.rows, tally.tokens, tally.loss)
        if shared
        else evaluate_loss(model, rows, max_tokens=max_tokens, pad_id=padding_token(model, tokenizer))
    )
    return {**loss, "accuracy": tally.right / tally.rows, "exact_match": tally.exact / tally.rows}


def _completion(row: EncodedRow) -> Tokens:
    return () if row.prompt_len is None else tuple(row.input_ids[row.prompt_len : row.turn_end])


def _answer(row: EncodedRow) -> Tokens:
    return () if not row.prompt_len else tuple(row.input_ids[row.prompt_len : row.answer_end])


def _loss_is_on_completion(row: EncodedRow) -> bool:
    """Whether the last completion's tokens, and no others, carry loss."""
    completion = _completion(row)
    start = row.prompt_len or 0
    return row.supervised_tokens == len(completion) and tuple(row.labels[start : start + len(completion)]) == completion


def _batches(rows: Sequence[EncodedRow], max_tokens: int) -> Iterator[list[EncodedRow]]:
    """All rows, the longest prompts first, so that the largest batch comes, and fails, first."""
    order = sorted(rows, key=lambda row: row.prompt_len or 0, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, min(MAX_ROWS, max_tokens // (order[start].prompt_len or 1)))
        yield order[start : start + size]
        start += size


def _score_batch(
    model: nn.Module, tokenizer: Any, batch: Sequence[EncodedRow], labels: LabelSet, tally: _Tally
) -> None:
    pad_id = padding_token(model, tokenizer)
    gold = [_completion(row) for row in batch]
    prompted = _run_prompts(model, [row.input_ids[: row.prompt_len] for row in batch], pad_id)
    first = torch.log_softmax(head_logits(model, prompted.last), dim=-1)  # fp32 [B, V]
    tally.rows += len(batch)
    tally.tokens += sum(map(len, gold))
    tally.loss -= _log_likelihood(model, prompted, first, gold, pad_id).double().sum().item()
    scores = [_log_likelihood(model, prompted, first, [label] * len(batch), pad_id) for label in labels.scored]
    picked = torch.stack(scores, dim=1).argmax(dim=1).tolist()
    tally.right += sum(labels.answers[index] == _answer(row) for index, row in zip(picked, batch, strict=True))
    ends = end_tokens(model, tokenizer) | labels.ends
    made = _greedy(model, prompted, first, labels.longest + _EXTRA_TOKENS, ends)
    tally.exact += sum(
        _text(tokenizer, tokens) == _text(tokenizer, _answer(row)) for tokens, row in zip(made, batch, strict=True)
    )


def _run_prompts(model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int) -> _Prompted:
    """The pass that all else shares; prompts are padded on the left."""
    device = model_device(model)
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    positions = torch.arange(width, device=device) - (width - lengths[:, None])  # [B, P], negative on padding
    mask = (positions >= 0).long()
    output = decoder_output(model, ids, mask, position_ids=positions.clamp(min=0), use_cache=True)
    return _Prompted(output.past_key_values, mask, lengths, output.last_hidden_state[:, -1])


def _continue(model: nn.Module, prompted: _Prompted, ids: Tensor) -> tuple[Tensor, _Prompted]:
    """Hidden states [B, t, d] of the tokens [B, t] that follow, and the state after them; `prompted` is kept."""
    steps = torch.arange(ids.shape[1], device=ids.device)
    mask = torch.cat([prompted.mask, torch.ones_like(ids)], dim=1)
    cache = _fork(prompted.cache)
    positions = prompted.lengths[:, None] + steps
    output = decoder_output(model, ids, mask, position_ids=positions, past_key_values=cache, use_cache=True)
    hidden = cast(Tensor, output.last_hidden_state)
    return hidden, _Prompted(output.past_key_values, mask, prompted.lengths + ids.shape[1], hidden[:, -1])


def _log_likelihood(
    model: nn.Module, prompted: _Prompted, first: Tensor, continuations: Sequence[Tokens], pad_id: int
) -> Tensor:
    """Summed log-probability fp32 [B] of one continuation a row; `first` [B, V] is that of the next token."""
    device = first.device
    width = max(len(tokens) for tokens in continuations)
    ids = torch.tensor([[*tokens, *[pad_id] * (width - len(tokens))] for tokens in continuations], device=device)
    total = first.gather(1, ids[:, :1]).squeeze(1)
    if width == 1:
        return total
    hidden, _ = _continue(model, prompted, ids[:, :-1])
    lengths = torch.tensor([len(tokens) for tokens in continuations], device=device)
    real = torch.arange(1, width, device=device) < lengths[:, None]  # [B, t - 1]
    rest = torch.zeros(real.shape, device=device)
    rest[real] = token_log_probs(model, hidden[real], ids[:, 1:][real])
    return total + rest.sum(dim=1)


def _greedy(model: nn.Module, prompted: _Prompted, first: Tensor, limit: int, ends: set[int]) -> list[list[int]]:
    """The most likely token after each prompt, `limit` times or up to an end token, which is left out."""
    answers: list[list[int]] = [[] for _ in range(first.shape[0])]
    running = [True] * len(answers)
    token = first.argmax(dim=-1)
    for step in range(limit):
        for row, value in enumerate(token.tolist()):
            running[row] = running[row] and value not in ends
            if running[row]:
                answers[row].append(value)
        if step + 1 == limit or not any(running):
            break
        hidden, prompted = _continue(model, prompted, token[:, None])
        token = head_logits(model, hidden[:, -1]).argmax(dim=-1)
    return answers


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def _fork(cache: Any) -> Any:
    """A cache that can grow on its own; see the module's docstring for when it is a copy."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return copy.deepcopy(cache)
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
