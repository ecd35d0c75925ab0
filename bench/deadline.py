"""A limit on time that holds: work is cut with what it has, and a card that hangs ends the process.

Two ways, because a signal is only seen between two lines of Python: the alarm cuts what computes, or waits for a
process of its own (which ends with it); a thread cuts what waits for a card that never answers.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HUNG = 3
"""Exit code of a process whose card did not answer."""


class CutError(BaseException):
    """The time is up. Not an ``Exception``, so that nothing on the way takes it for a failure of its own."""


@contextmanager
def cut_after(seconds: float, grace: float, last_words: Callable[[], None]) -> Iterator[None]:
    """Raise ``CutError`` in the main thread after ``seconds``; where that is not heard, end the process.

    Args:
        seconds: Time for the work.
        grace: Seconds more until the process is ended, with exit code ``HUNG``.
        last_words: Called before that, from another thread.
    """

    def cut(signal_number: int, frame: FrameType | None) -> None:
        raise CutError(f"cut after {seconds:g} s")

    def end() -> None:
        try:
            last_words()
        finally:
            os._exit(HUNG)

    before = signal.signal(signal.SIGALRM, cut)
    watch = threading.Timer(seconds + grace, end)
    watch.daemon = True
    watch.start()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watch.cancel()
