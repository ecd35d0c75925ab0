"""Preferences: how much likelier than the base the model makes the chosen answers, and how much less the rejected ones.

    margin = (log p(chosen) - log p_base(chosen)) - (log p(rejected) - log p_base(rejected))
    loss   = -log sigmoid(beta * margin)

Log-probabilities are sums over an answer's tokens. The base is the model itself with the adapter off, so there is no
second model, and its figures cost one forward pass. Rows come in pairs, a chosen answer's and the rejected one's behind
it; how they are cut into micro-batches does not matter, since each row is scored by itself.

Source: direct preference optimisation, arXiv 2305.18290.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypedDict

import torch
from torch import Tensor, nn

from qrosa.adapters.inject import quantized_linears
from qrosa.data.batching import MicroBatch, each_micro_batch
from qrosa.data.encode import EncodedRow
from qrosa.errors import TrainingError
from qrosa.eval.perplexity import IGNORED, MAX_ROWS
from qrosa.model.head import CHUNK_TOKENS, decoder_output, evaluating, model_device, token_log_probs


class PreferenceSums(TypedDict):
    """Sums over pairs, which add up over processes."""

    pairs: float
    supervised_tokens: float
    loss: float
    right: float
    margin: float


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
    model: nn.Module, batches: Iterable[MicroBatch], rows: int, *, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of rows' supervised tokens, of the model and of its base; no gradients, no dropout.

    Args:
        model: A model with an adapter.
        batches: Micro-batches of the rows, whose ``row_ids`` say which.
        rows: How many rows there are.
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


def margins(policy: Tensor, reference: Tensor) -> Tensor:
    """The margin of each pair: rows [2 n] of chosen and rejected in turn -> [n]."""
    gained = (policy - reference).view(-1, 2)
    return gained[:, 0] - gained[:, 1]


def losses(margin: Tensor, beta: float) -> Tensor:
    """The loss of each pair."""
    return nn.functional.softplus(-beta * margin)


def slopes(margin: Tensor, beta: float) -> Tensor:
    """What the loss of a pair changes by with the cross-entropy of each of its rows: [n] -> [2 n], in turn."""
    slope = beta * torch.sigmoid(-beta * margin)
    return torch.stack((slope, -slope), dim=1).view(-1)


def sum_preferences(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    *,
    beta: float,
    max_tokens: int,
    pad_id: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PreferenceSums:
    """Score pairs of rows.

    Args:
        model: A model with an adapter; its mode is kept.
        rows: Chosen and rejected in turn.
        beta: Factor on the margin.
        max_tokens: Most tokens, padding included, that are computed at once.
        pad_id: Token to pad with; it is masked.
        progress: Called with the rows done and all rows.

    Returns:
        Sums over the pairs; ``right`` counts those whose margin is above 0.
    """
    supervised = 0

    def told() -> Iterator[MicroBatch]:
        nonlocal supervised
        done = 0
        for batch in each_micro_batch(rows, max_rows=MAX_ROWS, max_tokens=max_tokens, pad_id=pad_id):
            yield batch
            supervised += batch.supervised_tokens
            done += batch.input_ids.shape[0]
            if progress is not None:
                progress(done, len(rows))

    margin = margins(*score(model, told(), len(rows)))
    return {
        "pairs": float(len(margin)),
        "supervised_tokens": float(supervised),
        "loss": float(losses(margin, beta).sum()),
        "right": float((margin > 0).sum()),
        "margin": float(margin.sum()),
    }


class PreferenceResult(TypedDict):
    """What held-out pairs show: ``rows`` are pairs, ``margin`` is in nats, without beta."""

    rows: int
    supervised_tokens: int
    loss: float
    accuracy: float
    margin: float


def preference_result(sums: PreferenceSums) -> PreferenceResult:
    """Means over all pairs.

    Raises:
        TrainingError: The loss is not finite.
    """
    pairs = sums["pairs"]
    loss = sums["loss"] / pairs
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of these pairs is {loss:g}: the model computes nothing sensible",
            "check that the base and the adapter are not damaged, and that training has not diverged",
        )
    return {
        "rows": int(pairs),
        "supervised_tokens": int(sums["supervised_tokens"]),
        "loss": loss,
        "accuracy": sums["right"] / pairs,
        "margin": sums["margin"] / pairs,
    }
