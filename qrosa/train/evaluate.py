"""Evaluation while training: the loss of held-out rows, with a micro-batch of its own that shrinks on its own.

Running out of memory here says nothing about training, so the training micro-batch stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from qrosa.config import TrainConfig
from qrosa.data.store import row_lengths, with_supervised_tokens
from qrosa.errors import DoesNotFitError
from qrosa.eval.perplexity import evaluate_loss, loss_result
from qrosa.eval.preferences import PreferenceSums, preference_result, sum_preferences
from qrosa.optim.machines import Machines, Processes
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
    train: TrainConfig,
    progress: Advance | None = None,
) -> tuple[dict[str, Any], int]:
    """Loss and perplexity of ``rows`` over all processes, or what `PreferenceResult` says of rows that are compared.

    Args:
        model: The model; its mode is kept.
        rows: Held-out rows, the same list on every process.
        max_tokens: Tokens, padding included, to compute at once; halved when memory runs out.
        pad_id: Token to pad with.
        accelerator: The processes that share the rows.
        train: The run's settings, of which the objective says what is measured.
        progress: Called with (rows done, all rows of this process).

    Returns:
        ``{"rows", "supervised_tokens", "loss", "perplexity"}``, or ``accuracy`` and ``margin`` in place of the last,
        and the ``max_tokens`` that did.

    Raises:
        DoesNotFitError: A single row does not fit.
    """
    goal = train.goal
    if not goal.compares:
        mine = with_supervised_tokens(rows[accelerator.process_index :: accelerator.num_processes])
    else:
        mine = own_share(rows, goal.group, accelerator)
    longest = max(row_lengths(mine), default=1)
    while True:
        try:
            sums = _share(model, mine, max_tokens, pad_id, train, accelerator, progress)
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
    drift = sums.get("drift")
    sums = dict(zip(sums, add_up(accelerator, list(sums.values())), strict=True))
    if drift is not None:
        return dict(preference_result(cast(PreferenceSums, {**sums, "drift": drift}), goal)), max_tokens
    return dict(loss_result(len(rows), int(sums["supervised_tokens"]), sums["loss"])), max_tokens


def add_up(processes: Processes, values: Sequence[float]) -> list[float]:
    """The sums of numbers over all of some processes."""
    if processes.num_processes == 1:
        return list(values)
    return cast(
        list[float], processes.reduce(torch.tensor(values, dtype=torch.float64, device=processes.device)).tolist()
    )


def own_share(rows: Sequence[EncodedRow], group: int, accelerator: Accelerator) -> list[EncodedRow]:
    """This process's share of rows of which ``group`` that follow each other belong together."""
    process, processes = accelerator.process_index, accelerator.num_processes
    return [row for index, row in enumerate(rows) if index // group % processes == process]


def machine_share(rows: Sequence[EncodedRow], group: int, machines: Machines) -> list[EncodedRow]:
    """The shares of all processes of this machine."""
    processes = machines.accelerator.num_processes
    return [row for index, row in enumerate(rows) if index // group % processes in machines.own]


def _share(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    max_tokens: int,
    pad_id: int,
    train: TrainConfig,
    accelerator: Accelerator,
    progress: Advance | None,
) -> dict[str, float]:
    """Sums that add up over processes."""
    if train.goal.compares:
        sums = sum_preferences(
            model,
            rows,
            train.goal,
            train,
            max_tokens=max_tokens,
            pad_id=pad_id,
            add_up=partial(add_up, accelerator),
            progress=progress,
        )
        return cast(dict[str, float], sums)
    if not rows:
        return {"loss": 0.0, "supervised_tokens": 0.0}
    result = evaluate_loss(model, rows, max_tokens=max_tokens, pad_id=pad_id, progress=progress)
    count = float(result["supervised_tokens"])
    return {"loss": result["loss"] * count, "supervised_tokens": count}
