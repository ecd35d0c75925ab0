"""Ranks by sensitivity inside a run: measured once on the main process's word, known from the checkpoint ever after.

A run that goes on takes the ranks of its checkpoint and never measures: the adapter's shapes are fixed, and another
machine, or an adapter that has learnt, would measure something else.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from qrosa.adapters.budget import Allocation, allocate
from qrosa.adapters.inject import linear_shapes
from qrosa.base.load import base_info
from qrosa.masks.sensitivity import measure_sensitivity
from qrosa.sparse.store import read_adapter_config
from qrosa.train.progress import Progress
from qrosa.train.selection import sample_loss, selection_rows

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from qrosa.record.checkpoint import Checkpoint
    from qrosa.train.prepare import Prepared


def measure_ranks(
    prepared: Prepared, model: PreTrainedModel, accelerator: Accelerator, progress: Progress
) -> Allocation:
    """The budget's split with ranks by sensitivity, on the rows that masks are selected on.

    Args:
        prepared: The run; ``with_ranks`` puts the result into it.
        model: The base, before it has an adapter.
        accelerator: The run's processes: all measure, the main one's figures count.
        progress: Told of each sample.

    Raises:
        TrainingError: A loss or a gradient is not finite, or all gradients are zero.
    """
    config = prepared.config
    found = measure_sensitivity(
        model,
        selection_rows(prepared.train.rows, config.masks.mask_samples, config.train.seed),
        loss=sample_loss(prepared.plan.work.loss_chunk_tokens),
        progress=lambda done, total: progress.stage("ranks", done, total),
    )
    agreed = _agree_on(accelerator, found)
    return allocate(config.adapter, linear_shapes(model), base_info(model).parameters, sensitivity=agreed)


def stored_ranks(prepared: Prepared, model: PreTrainedModel, checkpoint: Checkpoint) -> Allocation:
    """The split of the run that a checkpoint belongs to: its ranks, and what they left for the sparse part."""
    modules = read_adapter_config(checkpoint.folder)["modules"]
    ranks = {path: int(module["rank"]) for path, module in modules.items()}
    return allocate(prepared.config.adapter, linear_shapes(model), base_info(model).parameters, ranks=ranks)


def with_ranks(prepared: Prepared, allocation: Allocation) -> Prepared:
    """The run with its final split, in its plan, too, whose memory stays as it was planned."""
    plan = dataclasses.replace(prepared.plan, allocation=allocation, ranks_measured=True)
    return dataclasses.replace(prepared, allocation=allocation, plan=plan)


def _agree_on(accelerator: Accelerator, found: dict[str, float]) -> dict[str, float]:
    """The main process's figures, on every process: cards may round differently, and a near tie would part them."""
    if accelerator.num_processes == 1:
        return found
    from accelerate.utils import broadcast

    values = torch.tensor(list(found.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(found, broadcast(values).tolist(), strict=True))
