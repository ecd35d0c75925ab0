"""Checks that a run teaches the model something, and stops when it cannot (exit code 4).

Adapters that silently learn nothing are the most expensive fault of fine-tuning: the run ends well, and the model is
the base. Three things are watched: the loss and the gradients are finite, before each update; no part's gradient is
exactly zero over its first steps; no part's values are the same at the end as before its first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from qrosa.errors import InputError, TrainingError

FIRST_STEPS = 3


def check_finite(loss: float, norm: float, step: int, last_good: str | None) -> None:
    """Refuse an update from a loss or gradient that is not finite.

    Args:
        loss: Mean loss of the step.
        norm: Gradient norm of the step.
        step: The step, counted from 1.
        last_good: Where the newest checkpoint lies, if there is one.

    Raises:
        TrainingError: NaN or infinity; the update was not made.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the loss is {loss:g}" if not math.isfinite(loss) else f"the gradient norm is {norm:g}"
    where = f"the last good checkpoint is {last_good}; " if last_good else "no checkpoint was written yet; "
    raise TrainingError(f"training diverged at step {step}: {what}", where + "try a lower --lr and --sparse-lr")


def check_supervised(tokens: int, step: int) -> None:
    """Refuse a step without a token that carries loss.

    Raises:
        InputError: There is none.
    """
    if tokens == 0:
        raise InputError(
            f"step {step} has no supervised token in any of its rows",
            "raise --seq-len (completions may be cut off), check the chat template, or use --train-on all",
        )


class ZeroGradientGuard:
    """Notices a part whose gradient is exactly zero over its first steps."""

    def __init__(self) -> None:
        self._zero_steps: dict[str, int] = {}
        self._alive: set[str] = set()

    def watches(self, parts: Iterable[str]) -> bool:
        """Whether any of these parts has yet to show a gradient."""
        return not self._alive.issuperset(parts)

    def see(self, norms: Mapping[str, float]) -> None:
        """Take in a step's gradient norm of each part.

        Raises:
            TrainingError: A part has had no gradient in any of its first steps.
        """
        for part, norm in norms.items():
            if norm != 0.0:
                self._alive.add(part)
            if part in self._alive:
                continue
            self._zero_steps[part] = self._zero_steps.get(part, 0) + 1
            if self._zero_steps[part] >= FIRST_STEPS:
                raise TrainingError(
                    f"the gradient of the {part.replace('_', '-')} part was exactly zero over its first "
                    f"{FIRST_STEPS} steps",
                    "nothing would be learnt: check that the base is not damaged and that the rows are not empty",
                )


def check_changed(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Refuse to call a run done whose adapter is what it was.

    Args:
        before: Part -> digest before its first step.
        after: Part -> digest now.

    Raises:
        TrainingError: A part has not changed.
    """
    for part, digest in after.items():
        if before.get(part) == digest:
            raise TrainingError(
                f"the {part.replace('_', '-')} part has not changed in training",
                "raise its learning rate (--lr, --sparse-lr) or the number of steps",
            )
