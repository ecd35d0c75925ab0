"""Loss and perplexity of rows: the mean negative log-likelihood of the supervised tokens, and its exponential.

The mean is over tokens, not over batches or rows, so the result does not depend on how rows are batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

from torch import nn

from qrosa.data.batching import each_micro_batch
from qrosa.data.encode import EncodedRow
from qrosa.errors import InputError, TrainingError
from qrosa.model.head import decoder_output, evaluating, model_device, token_log_probs

IGNORED = -100
MAX_TOKENS = 4096
MAX_ROWS = 64


class LossResult(TypedDict):
    """What `evaluate_loss` measures."""

    rows: int
    supervised_tokens: int
    loss: float
    perplexity: float


def evaluate_loss(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    *,
    max_tokens: int = MAX_TOKENS,
    pad_id: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LossResult:
    """Measure the loss of `rows`.

    Args:
        model: A transformers causal language model; its training mode is kept.
        rows: Encoded rows; labels of -100 carry no loss.
        max_tokens: Most tokens, padding included, that are computed at once.
        pad_id: Token to pad with; it is masked.
        progress: Called with the rows done and all rows.

    Returns:
        Rows, supervised tokens, mean loss per supervised token in nats, and perplexity.

    Raises:
        InputError: No row has a supervised token.
    """
    total, count, done = 0.0, 0, 0
    device = model_device(model)
    with evaluating(model):
        for batch in each_micro_batch(rows, max_rows=MAX_ROWS, max_tokens=max_tokens, pad_id=pad_id):
            batch = batch.to(device)
            hidden = decoder_output(model, batch.input_ids, batch.attention_mask, use_cache=False).last_hidden_state
            labels = batch.labels[:, 1:]
            supervised = labels != IGNORED
            log_probs = token_log_probs(model, hidden[:, :-1][supervised], labels[supervised])
            total -= log_probs.double().sum().item()
            count += log_probs.numel()
            done += batch.input_ids.shape[0]
            if progress is not None:
                progress(done, len(rows))
    return loss_result(len(rows), count, total)


def loss_result(rows: int, supervised_tokens: int, total: float) -> LossResult:
    """The result for a summed loss.

    Raises:
        InputError: No supervised token.
        TrainingError: The loss is not finite.
    """
    if not supervised_tokens:
        raise InputError("no row has a token to score", "give rows with completions, or --train-on all")
    loss = total / supervised_tokens
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of these rows is {loss:g}: the model computes nothing sensible",
            "check that the base and the adapter are not damaged, and that training has not diverged",
        )
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"rows": rows, "supervised_tokens": supervised_tokens, "loss": loss, "perplexity": perplexity}
