"""What a run remembers between two steps, and therefore between two processes: plain values, stored as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qrosa.data.batching import Limits
from qrosa.errors import StorageError


@dataclass
class RunState:
    """The part of a run that changes.

    Attributes:
        step: Optimizer steps done.
        selected_at: Steps that were done when the masks were picked, or None before.
        limits: Training micro-batch now in use.
        eval_tokens: Tokens, padding included, that an evaluation computes at once.
        chunk_tokens: Positions whose logits exist at once.
        seconds: Time spent in steps, over all processes that carried the run.
        tokens: Tokens trained on, padding not counted.
        first_loss: Loss of the first step.
        last_loss: Loss of the last step done.
        evaluation: The last evaluation, as ``qrosa.eval`` gave it, with its step.
        best: The same of the one with the lowest loss since the masks were picked; empty before the first.
        since_best: Evaluations since then that were no better.
        resumed_at: Steps that were done when the run went on after a stop, in order.
        changes: Micro-batches that were halved for want of memory.
        digests: Part -> SHA-256 of its values before the first step on them.
        peaks: Phase -> highest memory in bytes.
    """

    limits: Limits
    eval_tokens: int
    chunk_tokens: int
    step: int = 0
    selected_at: int | None = None
    seconds: float = 0.0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    since_best: int = 0
    resumed_at: list[int] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunState:
        """The state that ``to_json`` gave.

        Raises:
            StorageError: It did not give this: a value is missing, unknown, of another type or out of range.
        """
        try:
            state = cls(**{**values, "limits": Limits(**values["limits"])})
            sound = state._is_sound()
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise StorageError("the state of the run does not add up", "resume from another checkpoint")
        return state

    def _is_sound(self) -> bool:
        counts = (self.limits.rows, self.limits.tokens, self.eval_tokens, self.chunk_tokens)
        losses = (self.first_loss, self.last_loss)
        return (
            all(type(count) is int and count > 0 for count in counts)
            and type(self.step) is int
            and self.step >= 0
            and (self.selected_at is None or (type(self.selected_at) is int and 0 <= self.selected_at <= self.step))
            and all(loss is None or type(loss) is float for loss in losses)
            and isinstance(self.seconds, (int, float))
            and 0 <= self.seconds < math.inf
            and type(self.tokens) is int
            and isinstance(self.evaluation, dict)
            and self._best_is_sound()
            and isinstance(self.resumed_at, list)
            and all(type(step) is int for step in self.resumed_at)
            and isinstance(self.changes, list)
            and all(isinstance(digest, str) for digest in self.digests.values())
            and all(type(size) is int for size in self.peaks.values())
        )

    def _best_is_sound(self) -> bool:
        step, loss = self.best.get("step"), self.best.get("loss")
        known = type(step) is int and 0 <= step <= self.step and type(loss) is float
        return (known or self.best == {}) and type(self.since_best) is int and self.since_best >= 0
