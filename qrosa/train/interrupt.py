"""Stopping between two steps: a signal asks, the loop answers when the step is done.

The first SIGINT, SIGTERM or SIGHUP (a terminal that was closed) only leaves a note. The loop reads it after each step,
writes a checkpoint and leaves with ``InterruptedRunError``; while masks are picked it reads it after each sample, and
leaves with the checkpoint that was written before. A second SIGINT means that the user will not wait: it raises
KeyboardInterrupt at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Context in which SIGINT, SIGTERM and SIGHUP are noted instead of obeyed.

    Attributes:
        requested: Name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        # Python delivers signals to the main thread only; elsewhere the caller keeps its own handling.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP: that stays
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
