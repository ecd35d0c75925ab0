"""Threads that wait for each other sleep at once while other processes want the processor, and spin while none does.

At the end of every parallel loop OpenMP's threads spin for a while before they sleep. Alone on a machine that saves a
wake-up a loop; beside a busy process the thread that spins takes the turn of the one that it waits for. Training on two
cores beside one such process ran at a quarter of its speed alone, and at three fifths when threads slept at once; but a
machine of its own is a fifth faster with spinning (``bench/bench_sharing.py``).

GNU's OpenMP reads the length of spinning once, when it is loaded. What can be changed later is this: while it has more
threads than there are processors, it spins a hundredth as long. So a thread with a team of its own, which does nothing,
waits beside the others for as long as the machine is busy.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_STAT = "/proc/stat"
_EVERY = 1.0  # seconds between two looks
_BUSY, _IDLE = 0.3, 0.15  # processors that others use: from when on it counts, and until when
_ELEMENTS = 1 << 17  # of an operation that PyTorch gives to several threads (32,768 elements each)


@dataclass(frozen=True)
class Used:
    """Seconds of processor time since the start of the machine, and of this process.

    Attributes:
        all: By every process, on the processors that this one may use; not by processes that give way (nice).
        own: By this process.
    """

    all: float
    own: float


def used(stat: str, processors: set[int], tick: int, own: float) -> Used:
    """Read ``/proc/stat``.

    Args:
        stat: Its text.
        processors: Numbers of those that count.
        tick: Its units a second.
        own: Seconds of processor time of this process.
    """
    busy = 0
    for line in stat.splitlines():
        name, *numbers = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in processors:
            user, _, system, _, _, interrupts, soft = (int(number) for number in numbers[:7])
            busy += user + system + interrupts + soft
    return Used(busy / tick, own)


def _used_now() -> Used | None:
    """None where the system does not say, or where this process itself gives way to others."""
    try:
        if os.nice(0) > 0:
            return None
        with open(_STAT, encoding="ascii") as file:
            text = file.read()
        return used(text, os.sched_getaffinity(0), os.sysconf("SC_CLK_TCK"), time.process_time())
    except (OSError, ValueError, AttributeError):
        return None


def _threads() -> int:
    """Those of a parallel loop; 0 before there is a PyTorch to ask."""
    ask = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return 0 if ask is None else int(ask())


class Sleeper:
    """A thread with an idle OpenMP team: while it lives, no thread of this process spins for long."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._wait, name="qrosa-sleeper", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        sys.modules["torch"].ones(_ELEMENTS).add_(1)  # makes the team
        self._end.wait()

    def end(self) -> None:
        """Let the threads spin again."""
        self._end.set()
        self._thread.join()


class Watch:
    """Looks at what others use, and decides."""

    def __init__(self) -> None:
        self.sleeper: Sleeper | None = None
        self._last: tuple[float, Used] | None = None

    def look(self, now: float, figures: Used) -> None:
        """Compare with the look before.

        Args:
            now: Seconds of any steady clock.
            figures: As of now.
        """
        last, self._last = self._last, (now, figures)
        if last is None or now <= last[0]:
            return
        others = (figures.all - last[1].all - (figures.own - last[1].own)) / (now - last[0])
        computes = figures.own - last[1].own > 0.5 * (now - last[0])
        if self.sleeper is None and others > _BUSY and computes and _threads() > 1:
            self.sleeper = Sleeper()
        elif self.sleeper is not None and others < _IDLE:
            self.end()

    def end(self) -> None:
        """As if nobody else was there."""
        if self.sleeper is not None:
            self.sleeper.end()
            self.sleeper = None


@contextmanager
def short_beside_others() -> Iterator[None]:
    """While the block runs, OpenMP's threads spin only as long as no other process is busy."""
    over = threading.Event()

    def run() -> None:
        watch = Watch()
        while (figures := _used_now()) is not None:
            watch.look(time.monotonic(), figures)
            if over.wait(_EVERY):
                break
        watch.end()

    thread = threading.Thread(target=run, name="qrosa-spinning", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
