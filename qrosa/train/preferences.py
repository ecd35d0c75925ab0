"""A step that compares answers, in the memory of plain training.

The loss of answers that are compared is a function of few numbers, their log-probabilities under the model and under
its base, and so is its slope in each of them (``qrosa.eval.objectives``). So a step first scores its rows without
gradients, adapter on and, where the objective asks, off, and then trains on the same micro-batches with the usual loss,
each row weighed by its slope. What is learnt is exactly the gradient of the objective's loss, but the two answers of a
pair need not be in memory at once. The price is one more forward pass than with both answers in one graph.

Scoring and training are each repeated by themselves where memory runs out: what processes tell each other in between is
told once a step, whatever happens to one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qrosa.config import TrainConfig
from qrosa.data.batching import MicroBatch
from qrosa.data.encode import EncodedRow
from qrosa.eval.objectives import Objective, Scores, Weights
from qrosa.eval.preferences import AddUp, answer_tokens, mean_drift, score, slopes, sum_drift
from qrosa.train.loss import model_loss
from qrosa.train.step import StepRunner, micro_batch_seed


class PreferenceRunner(StepRunner):
    """Gradients of rows that are compared, whose normaliser is the number of pairs, or of rows with labels.

    Args:
        objective: What compares them.
        weights: Its settings.
        add_up: Adds up over the processes that share a step.
        arguments: Those of `StepRunner`, like ``settings``.
    """

    def __init__(
        self, *arguments: Any, objective: Objective, weights: Weights, add_up: AddUp = list, **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        self.objective = objective
        self.weights = weights
        self.add_up = add_up

    def gradients(self, rows: Sequence[EncodedRow], step: int, normaliser: int) -> float:
        """As `StepRunner.gradients`, of the objective's loss."""
        policy, reference = self._fitted(rows, step, lambda batches: self._score(batches, len(rows)))
        drift = 0.0
        if self.objective.mismatched:
            drift = mean_drift(*self.add_up(self._fitted(rows, step, lambda _: self._sum_drift(rows))))
        wanted = torch.tensor([row.wanted for row in rows], dtype=torch.bool)
        scores = Scores(policy, reference, answer_tokens(rows), wanted, drift)
        losses, slope = slopes(self.objective, scores, self.weights)
        weights = (slope / normaliser).float()
        self._fitted(rows, step, lambda batches: self._learn(batches, step, weights))
        return float(losses.sum())

    def _score(self, batches: Sequence[MicroBatch], rows: int) -> tuple[Tensor, Tensor]:
        reference = self.objective.reference
        return score(self.model, batches, rows, reference=reference, chunk_tokens=self.chunk_tokens)

    def _sum_drift(self, rows: Sequence[EncodedRow]) -> tuple[float, float]:
        return sum_drift(self.model, rows, limits=self.limits, pad_id=self.pad_id, chunk_tokens=self.chunk_tokens)

    def _learn(self, batches: Sequence[MicroBatch], step: int, weights: Tensor) -> None:
        for index, batch in enumerate(batches):
            torch.manual_seed(micro_batch_seed(self.seed, step, self.process, index))
            loss, _ = model_loss(
                self.model, batch.to(self.device), self.chunk_tokens, weights[batch.row_ids].to(self.device)
            )
            loss.backward()
            self.optimizer.accumulate()


def make_runner(train: TrainConfig, *arguments: Any, add_up: AddUp = list, **settings: Any) -> StepRunner:
    """What computes the gradients of a run's objective.

    Args:
        train: The run's settings.
        arguments: Those of `StepRunner`, like ``settings``.
        add_up: Adds up numbers over the processes that share a step.
    """
    if train.goal.compares:
        return PreferenceRunner(*arguments, objective=train.goal, weights=train, add_up=add_up, **settings)
    return StepRunner(*arguments, **settings)
