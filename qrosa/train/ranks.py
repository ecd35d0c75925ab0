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
from qrosa.train.agree import agree
from qrosa.train.callbacks import Callbacks
from qrosa.train.selection import sample_loss, selection_rows

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from qrosa.record.checkpoint import Checkpoint
    from qrosa.train.prepare import Prepared


def measure_ranks(
    prepared: Prepared, model: PreTrainedModel, accelerator: Accelerator, callbacks: Callbacks
) -> Allocation:
    """The budget's split with ranks by sensitivity, on the rows that masks are selected on.

    Args:
        prepared: The run; ``with_ranks`` puts the result into it.
        model: The base, before it has an adapter.
        accelerator: The run's processes: all measure, the main one's figures count.
        callbacks: Told of each sample.

    Raises:
        TrainingError: A loss or a gradient is not finite, or all gradients are zero.
    """
    config = prepared.config
    sensitivity = measure_sensitivity(
        model,
        selection_rows(prepared.train.wanted, config.masks.mask_samples, config.train.seed),
        loss=sample_loss(prepared.plan.work.loss_chunk_tokens),
        progress=callbacks.phase("ranks"),
    )
    values = torch.tensor(list(sensitivity.values()), dtype=torch.float64)
    agreed = dict(zip(sensitivity, agree(accelerator, [values])[0].tolist(), strict=True))
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
