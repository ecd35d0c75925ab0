"""Evaluation while training: the held-out loss, with a micro-batch of its own that shrinks on its own.

Running out of memory here says nothing about training, so the training micro-batch stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qrosa.data.store import row_lengths, with_supervised_tokens
from qrosa.errors import DoesNotFitError
from qrosa.eval.perplexity import evaluate_loss, loss_result
from qrosa.train.callbacks import Advance
from qrosa.train.step import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qrosa.data.encode import EncodedRow


def evaluate(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    *,
    max_tokens: int,
    pad_id: int,
    accelerator: Accelerator,
    progress: Advance | None = None,
) -> tuple[dict[str, Any], int]:
    """Loss and perplexity of ``rows`` over all processes.

    Args:
        model: The model; its mode is kept.
        rows: Held-out rows, the same list on every process.
        max_tokens: Tokens, padding included, to compute at once; halved when memory runs out.
        pad_id: Token to pad with.
        accelerator: The processes that share the rows.
        progress: Called with (rows done, all rows of this process).

    Returns:
        ``{"rows", "supervised_tokens", "loss", "perplexity"}`` and the ``max_tokens`` that did.

    Raises:
        DoesNotFitError: A single row does not fit.
    """
    mine = with_supervised_tokens(rows[accelerator.process_index :: accelerator.num_processes])
    longest = max(row_lengths(mine), default=1)
    while True:
        try:
            total, count = _share(model, mine, max_tokens, pad_id, progress)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        if max_tokens <= longest:
            raise DoesNotFitError(
                f"one row of {longest} tokens does not fit the memory in evaluation",
                "shorten the rows with --seq-len, or evaluate on shorter ones",
            )
        max_tokens = max(longest, max_tokens // 2)
    if accelerator.num_processes > 1:
        sums = torch.tensor([total, count], dtype=torch.float64, device=accelerator.device)
        total, count = accelerator.reduce(sums).tolist()
    return dict(loss_result(len(rows), int(count), total)), max_tokens


def _share(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    max_tokens: int,
    pad_id: int,
    progress: Advance | None,
) -> tuple[float, float]:
    if not rows:
        return 0.0, 0.0
    result = evaluate_loss(model, rows, max_tokens=max_tokens, pad_id=pad_id, progress=progress)
    return result["loss"] * result["supervised_tokens"], result["supervised_tokens"]
