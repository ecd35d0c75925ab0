"""When all processes hold one adapter: after every step, or where machines step on their own, at their meetings.

Machines meet every ``sync_every`` steps, before masks are picked and after the last step. Evaluations, checkpoints,
stops and the choice of the best are all processes' doing and of one adapter, so what falls due in between waits for the
next meeting.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from qrosa.config import TrainConfig
from qrosa.optim.local_steps import LocalStepsOptimizer, left_out
from qrosa.optim.parts import Optimizer
from qrosa.optim.schedule import Phases
from qrosa.record.state import RunState


class Meetings:
    """Brings processes together after a step, and knows what has fallen due since they last were.

    Args:
        train: ``sync_every`` is read.
        phases: Length of the phases.
        state: The run's, which tells how far it is.
        optimizer: A ``LocalStepsOptimizer`` where machines step on their own.
        notice: Told of machines that were left out.
    """

    def __init__(
        self,
        train: TrainConfig,
        phases: Phases,
        state: RunState,
        optimizer: Optimizer,
        notice: Callable[[str], None],
    ) -> None:
        self.every = train.sync_every
        self.phases = phases
        self.state = state
        self.apart = optimizer if isinstance(optimizer, LocalStepsOptimizer) else None
        self.notice = notice
        self._last, self._before = state.step, state.step - 1
        self._waiting = False

    def after_step(self, signal: str | None) -> bool:
        """Whether the step just done ends in a meeting, which is then held.

        Args:
            signal: That asked this process to stop, which it does where all can.
        """
        step = self.state.step
        if self.apart is not None:
            selects = self.phases.sparse and self.state.selected_at is None and step >= self.phases.warmup
            if step % self.every and step < self.phases.total and not selects:
                if signal is not None and not self._waiting:
                    self.notice(f"{signal}: stops where the machines next meet")
                    self._waiting = True
                return False
            begun = time.perf_counter()
            left = left_out(self.apart.meet(), step)
            self.state.seconds += time.perf_counter() - begun  # as a step's own exchange is counted
            for text in left:
                self.notice(text)
        self._before, self._last = self._last, step
        return True

    def due(self, every: int | None) -> bool:
        """Whether a multiple of ``every`` steps has been done since the meeting before this one."""
        return every is not None and self._last > 0 and self._last // every > self._before // every
