"""What machines that step on their own pay for their meetings, and from how many steps in between it is little.

A meeting moves what one step of plain training moves between machines, once in ``--sync-every`` steps. Nothing hides
it: machines wait until the slowest is there and everything has travelled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qrosa.quantities import bytes_text

LITTLE = 0.05  # share of the time that a network may take


@dataclass(frozen=True)
class Meeting:
    """One exchange between machines, and the steps that pay for it.

    Attributes:
        every: Steps between two.
        sent: Bytes that each card sends, and receives.
        seconds: Of the exchange.
        step_seconds: Of a step without it.
    """

    every: int
    sent: int
    seconds: float
    step_seconds: float

    @property
    def share(self) -> float:
        """Of the time, what goes into meetings."""
        return self.seconds / (self.seconds + self.every * self.step_seconds)

    @property
    def enough(self) -> int:
        """The fewest steps in between with which that is little."""
        return max(1, math.ceil(self.seconds * (1 - LITTLE) / (LITTLE * self.step_seconds) - 1e-9))

    def to_json(self) -> dict[str, Any]:
        """``meeting`` in the plan document's ``scaling``."""
        return {
            "sync_every": self.every,
            "bytes": self.sent,
            "seconds": self.seconds,
            "steps_seconds": self.every * self.step_seconds,
            "share": self.share,
            "enough": self.enough,
        }

    def describe(self, network: str) -> str:
        """One line."""
        what, steps = "adapters", f"every {self.every} steps"
        if self.every == 1:
            what, steps = "adapter gradients", "every step"
        line = (
            f"machines exchange {what} {steps}: {bytes_text(self.sent)} each in {self.seconds:.2g} s over {network}, "
            f"against {self.every * self.step_seconds:.2g} s of steps, {self.share:.0%} of the time"
        )
        if self.every >= self.enough:
            return line
        return f"{line}; --sync-every {self.enough} makes it {LITTLE:.0%}"
