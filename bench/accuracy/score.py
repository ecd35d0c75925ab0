"""Scores of a model on a task's rows, one value a row.

A task with labels is scored by the likeliest label: the labels' first tokens differ, so the logits after the prompt
decide, and one pass a row is all it takes. Where text is generated, the value is the F1 of its ``slot: value`` pairs
against the wanted ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qrosa.data.encode import EncodedRow
from qrosa.eval.generate import end_tokens
from qrosa.model.head import decoder_output, evaluating, head_logits, model_device

MOST_TOKENS = 1024  # of a batch, padding included
ANSWER_TOKENS = 80  # generated at most


@dataclass(frozen=True)
class Score:
    """How a model did.

    Attributes:
        values: Row -> 0 to 1, in the rows' order.
        loss: Mean cross-entropy in nats of the right label's first token among the labels' first tokens; None where
            text was generated.
        exact: Share of generated texts that are the wanted ones; None where there are labels.
    """

    values: tuple[float, ...]
    loss: float | None = None
    exact: float | None = None

    @property
    def mean(self) -> float:
        """Mean over rows: accuracy, or F1."""
        return sum(self.values) / len(self.values)


def score_labels(model: Any, tokenizer: Any, rows: Sequence[EncodedRow], labels: Sequence[str]) -> Score:
    """Accuracy and loss on rows whose completion is one of ``labels``.

    Raises:
        ValueError: Two labels begin with the same token.
    """
    firsts = [tokenizer.encode(label, add_special_tokens=False)[0] for label in labels]
    if len(set(firsts)) < len(firsts):
        raise ValueError(f"two of the labels {labels} begin with the same token")
    wanted = [firsts.index(row.input_ids[row.prompt_len or 0]) for row in rows]
    values, loss = [0.0] * len(rows), 0.0
    device = model_device(model)
    with evaluating(model):
        for batch in _batches(rows):
            prompts = [rows[index].input_ids[: rows[index].prompt_len] for index in batch]
            width = max(map(len, prompts))
            # Padded on the right: what follows a token cannot change it.
            ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
            lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
            mask = (torch.arange(width, device=device) < lengths[:, None]).long()
            hidden = decoder_output(model, ids, mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(batch), device=device), lengths - 1]
            logs = torch.log_softmax(head_logits(model, last)[:, firsts], dim=-1)
            for index, row in zip(batch, logs.tolist(), strict=True):
                values[index] = float(row.index(max(row)) == wanted[index])
                loss -= row[wanted[index]]
    return Score(tuple(values), loss=loss / len(rows))


def score_text(model: Any, tokenizer: Any, rows: Sequence[EncodedRow]) -> Score:
    """F1 of slots, and exact match, of greedily generated text."""
    values, exact = [0.0] * len(rows), 0
    with evaluating(model):
        for batch in _batches(rows):
            prompts = [rows[index].input_ids[: rows[index].prompt_len] for index in batch]
            for index, made in zip(batch, _generate(model, tokenizer, prompts), strict=True):
                row = rows[index]
                wanted = tokenizer.decode(row.input_ids[row.prompt_len : row.answer_end], skip_special_tokens=True)
                values[index] = slot_f1(made, wanted)
                exact += made.strip() == wanted.strip()
    return Score(tuple(values), exact=exact / len(rows))


def slot_f1(made: str, wanted: str) -> float:
    """F1 of the ``slot: value`` pairs of two texts; 0 where neither has any."""
    a, b = Counter(_slots(made)), Counter(_slots(wanted))
    both = sum((a & b).values())
    return 2 * both / (a.total() + b.total()) if both else 0.0


def _slots(text: str) -> list[tuple[str, str]]:
    pairs = (part.partition(":") for part in re.split(r",\s*(?=[A-Za-z ]+:)", text))
    return [(name.strip(), value.strip()) for name, colon, value in pairs if colon]


def _batches(rows: Sequence[EncodedRow]) -> Iterator[list[int]]:
    """Indices of rows that are computed together, the longest prompts first."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].prompt_len or 0, reverse=True)
    while order:
        size = max(1, MOST_TOKENS // (rows[order[0]].prompt_len or 1))
        yield order[:size]
        order = order[size:]


def _generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The likeliest token after each prompt, up to an end token or ``ANSWER_TOKENS``."""
    device, width = model_device(model), max(map(len, prompts))
    pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    positions = torch.arange(width, device=device) - pads[:, None]
    mask, cache = (positions >= 0).long(), None
    positions = positions.clamp(min=0)
    ends = end_tokens(model, tokenizer)
    made: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for _ in range(ANSWER_TOKENS):
        output = decoder_output(
            model, ids, mask, position_ids=positions, past_key_values=cache, use_cache=True
        )  # the cache goes on from what it holds
        cache = output.past_key_values
        tokens: Tensor = head_logits(model, output.last_hidden_state[:, -1]).argmax(dim=-1)
        for index, token in enumerate(tokens.tolist()):
            running[index] = running[index] and token not in ends
            if running[index]:
                made[index].append(token)
        if not any(running):
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in made]
