"""What a run tells while it works; who shows it, and how, is the caller's business."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepLine:
    """One finished optimizer step.

    Attributes:
        step: Steps done, this one included.
        total: Steps to do in all.
        phase: ``warmup`` or ``train``.
        loss: Mean loss per supervised token.
        tokens_per_s: Tokens of the step, padding not counted, per second.
        memory: Peak bytes so far in this phase.
        planned: Bytes that the plan gives the phase, or None without a plan.
        seconds_left: Estimate for the remaining steps.
    """

    step: int
    total: int
    phase: str
    loss: float
    tokens_per_s: float
    memory: int
    planned: int | None
    seconds_left: float


class Progress:
    """Receives a run's progress and shows nothing; derive from it to show something."""

    def notice(self, text: str) -> None:
        """Something that people should know, such as a smaller micro-batch."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Work other than steps: ``load``, ``select``, ``eval``, ..."""

    def step(self, line: StepLine) -> None:
        """One optimizer step is done."""

    def evaluated(self, step: int, loss: float, perplexity: float) -> None:
        """An evaluation is done."""

    def close(self) -> None:
        """The run has ended, well or not."""
