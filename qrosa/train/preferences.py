"""A step of preference training that takes the memory of plain training.

The loss of a pair is a function of four numbers, the log-probabilities of its two answers under the model and under
its base, and so is its slope in each of them. So a step first scores its rows without gradients, adapter on and adapter
off, and then trains on the same micro-batches with the usual loss, each row weighed by its slope. What is learnt is
exactly the gradient of the pair's loss, but the two answers of a pair need not be in memory at once. The price is one
more forward pass than with both answers in one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qrosa.config import TrainConfig
from qrosa.data.batching import MicroBatch
from qrosa.eval.preferences import losses, margins, score, slopes
from qrosa.train.loss import model_loss
from qrosa.train.step import StepRunner, micro_batch_seed


class PreferenceRunner(StepRunner):
    """Gradients of pairs of rows, chosen and rejected in turn, whose normaliser is the number of pairs.

    Args:
        beta: Factor on the margin.
        arguments: Those of `StepRunner`.
    """

    def __init__(self, *arguments: Any, beta: float, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.beta = beta

    def _run(self, batches: Sequence[MicroBatch], step: int, normaliser: int) -> float:
        rows = sum(len(batch.row_ids) for batch in batches)
        margin = margins(*score(self.model, batches, rows, chunk_tokens=self.chunk_tokens))
        weights = (slopes(margin, self.beta) / normaliser).float()
        for index, batch in enumerate(batches):
            torch.manual_seed(micro_batch_seed(self.seed, step, self.process, index))
            loss, _ = model_loss(
                self.model, batch.to(self.device), self.chunk_tokens, weights[batch.row_ids].to(self.device)
            )
            loss.backward()
            self.optimizer.accumulate()
        return float(losses(margin, self.beta).sum())


def make_runner(train: TrainConfig, *arguments: Any, **settings: Any) -> StepRunner:
    """What computes the gradients of a run's objective.

    Args:
        train: The run's settings.
        arguments: Those of `StepRunner`, like ``settings``.
    """
    if train.objective == "dpo":
        return PreferenceRunner(*arguments, beta=train.beta, **settings)
    return StepRunner(*arguments, **settings)
