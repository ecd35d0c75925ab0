"""Answers compared: how likely the model makes them and, where the objective asks, how much likelier than its base.

Log-probabilities are sums over an answer's tokens. The base is the model itself with the adapter off, so there is no
second model, and its figures cost one forward pass. Each row is scored by itself, so how rows are cut into
micro-batches does not matter; what is made of the scores is in :mod:`qrosa.eval.objectives`.

The drift of KTO is what answers to *other* prompts gained on average: each row's prompt with the answer of the row
before it, cut to the longest row so that nothing longer is computed than what was planned for. In a step the rows are
the step's, in an evaluation they come in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.data.batching import Limits, MicroBatch, each_micro_batch, supervised_tokens
from qrosa.data.encode import EncodedRow
from qrosa.errors import TrainingError
from qrosa.eval.objectives import Objective, Scores, Weights
from qrosa.eval.perplexity import IGNORED, MAX_ROWS
from qrosa.model.head import CHUNK_TOKENS, decoder_output, evaluating, model_device, token_log_probs

AddUp = Callable[[Sequence[float]], list[float]]
"""Sums of numbers over all processes."""


class PreferenceSums(TypedDict):
    """Sums over pairs, or over rows with labels, which add up over processes; ``drift`` is the same on all of them."""

    examples: float
    supervised_tokens: float
    loss: float
    right: float
    margin: float
    drift: float


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The bare base inside the block."""
    layers = [layer for layer in quantized_linears(model).values() if layer.adapter_enabled]
    for layer in layers:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_enabled = True


def score(
    model: nn.Module, batches: Iterable[MicroBatch], rows: int, *, reference: bool, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of rows' supervised tokens, of the model and of its base; no gradients, no dropout.

    Args:
        model: A model, with an adapter where the base's are asked for.
        batches: Micro-batches of the rows, whose ``row_ids`` say which.
        rows: How many rows there are.
        reference: Ask for the base's; else they are zeros.
        chunk_tokens: Positions whose logits exist at once.

    Returns:
        fp64 [rows] each, on the CPU.
    """
    device = model_device(model)
    found = torch.zeros(2, rows, dtype=torch.float64)
    with evaluating(model):
        for batch in batches:
            batch = batch.to(device)
            _keep(found[0], batch.row_ids, _of_rows(model, batch, chunk_tokens))
            if reference:
                with adapter_off(model):
                    _keep(found[1], batch.row_ids, _of_rows(model, batch, chunk_tokens))
    return found[0], found[1]


def _keep(found: Tensor, row_ids: list[int], values: Tensor) -> None:
    if not values.is_meta:  # a simulation has no values
        found[row_ids] = values.cpu()


def _of_rows(model: nn.Module, batch: MicroBatch, chunk_tokens: int) -> Tensor:
    """fp64 [B]: the sums over each row's supervised tokens."""
    hidden = decoder_output(model, batch.input_ids, batch.attention_mask, use_cache=False).last_hidden_state
    labels = batch.labels[:, 1:]
    supervised = labels != IGNORED
    found = token_log_probs(model, hidden[:, :-1][supervised], labels[supervised], chunk_tokens)
    sums = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    sums[supervised] = found.double()
    return sums.sum(dim=1)


def mismatched(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """Each row's prompt with the answer of the row before it, the first one's with the last one's answer.

    None is longer than the longest of ``rows``; those of which no answer is left are left out, and so are all where a
    row has no other.
    """
    if len(rows) < 2:
        return []
    longest = max(len(row.input_ids) for row in rows)
    made = []
    for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        prompt, start = row.input_ids[: _answer_start(row)], _answer_start(other)
        ids = [*prompt, *other.input_ids[start:]][:longest]
        labels = [*[IGNORED] * len(prompt), *other.labels[start:]][:longest]
        made.append(EncodedRow(ids, labels, where=row.where))
    return [row for row in made if row.supervised_tokens]


def _answer_start(row: EncodedRow) -> int:
    return next((place for place, label in enumerate(row.labels) if label != IGNORED), len(row.labels))


def sum_drift(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    *,
    limits: Limits,
    pad_id: int,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[float, float]:
    """What answers to other prompts gained over the base: the sum, and how many there are."""
    others = mismatched(rows)
    batches = each_micro_batch(others, max_rows=limits.rows, max_tokens=limits.tokens, pad_id=pad_id)
    policy, reference = score(model, batches, len(others), reference=True, chunk_tokens=chunk_tokens)
    return float((policy - reference).sum()), float(len(others))


def mean_drift(total: float, count: float) -> float:
    """The drift of so many answers: their mean, not below 0."""
    return max(0.0, total / count) if count else 0.0


def slopes(objective: Objective, scores: Scores, weights: Weights) -> tuple[Tensor, Tensor]:
    """Losses of rows or pairs [m], and what their sum changes by with the cross-entropy of each row's answer [n]."""
    assert objective.loss is not None
    with torch.enable_grad():
        policy = scores.policy.clone().requires_grad_()
        losses, _ = objective.loss(replace(scores, policy=policy), weights)
        (slope,) = torch.autograd.grad(losses.sum(), policy)
    return losses.detach(), -slope


def answer_tokens(rows: Iterable[EncodedRow]) -> Tensor:
    """fp64 [n]: the tokens of each row's answer."""
    return torch.tensor([supervised_tokens(row) for row in rows], dtype=torch.float64)


def sum_preferences(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    objective: Objective,
    weights: Weights,
    *,
    max_tokens: int,
    pad_id: int = 0,
    add_up: AddUp = list,
    progress: Callable[[int, int], None] | None = None,
) -> PreferenceSums:
    """Score rows and compare them.

    Args:
        model: A model, with an adapter where the objective reads its base; its mode is kept.
        rows: Pairs as chosen and rejected in turn, or rows that know whether they are wanted.
        objective: What compares them.
        weights: Its settings.
        max_tokens: Most tokens, padding included, that are computed at once.
        pad_id: Token to pad with; it is masked.
        add_up: Adds up over processes that share the rows; called once by each, or not at all.
        progress: Called with the rows done and all rows.

    Returns:
        Sums over pairs or rows; ``right`` counts those whose margin is above 0.
    """
    limits = Limits(MAX_ROWS, max_tokens)

    def told() -> Iterator[MicroBatch]:
        done = 0
        for batch in each_micro_batch(rows, max_rows=limits.rows, max_tokens=limits.tokens, pad_id=pad_id):
            yield batch
            done += batch.input_ids.shape[0]
            if progress is not None:
                progress(done, len(rows))

    policy, reference = score(model, told(), len(rows), reference=objective.reference)
    drift = 0.0
    if objective.mismatched:
        parts = [sum_drift(model, block, limits=limits, pad_id=pad_id) for block in _blocks(rows)]
        drift = mean_drift(*add_up([math.fsum(total for total, _ in parts), sum(count for _, count in parts)]))
    tokens = answer_tokens(rows)
    wanted = torch.tensor([row.wanted for row in rows], dtype=torch.bool)
    assert objective.loss is not None
    losses, margin = objective.loss(Scores(policy, reference, tokens, wanted, drift), weights)
    return {
        "examples": float(len(margin)),
        "supervised_tokens": float(tokens.sum()),
        "loss": float(losses.sum()),
        "right": float((margin > 0).sum()),
        "margin": float(margin.sum()),
        "drift": drift,
    }


def _blocks(rows: Iterable[EncodedRow]) -> Iterator[list[EncodedRow]]:
    iterator = iter(rows)
    while block := list(islice(iterator, MAX_ROWS)):
        yield block


class PreferenceResult(TypedDict):
    """What held-out rows show: ``rows`` are pairs where answers come in pairs, ``margin`` is in nats, without beta."""

    rows: int
    supervised_tokens: int
    loss: float
    accuracy: float
    margin: float
    drift: NotRequired[float]


def preference_result(sums: PreferenceSums, objective: Objective) -> PreferenceResult:
    """Means over all pairs or rows; ``drift`` where the objective has one.

    Raises:
        TrainingError: The loss is not finite.
    """
    examples = sums["examples"]
    loss = sums["loss"] / examples
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of these rows is {loss:g}: the model computes nothing sensible",
            "check that the base and the adapter are not damaged, and that training has not diverged",
        )
    found: PreferenceResult = {
        "rows": int(examples),
        "supervised_tokens": int(sums["supervised_tokens"]),
        "loss": loss,
        "accuracy": sums["right"] / examples,
        "margin": sums["margin"] / examples,
    }
    return {**found, "drift": sums["drift"]} if objective.mismatched else found
