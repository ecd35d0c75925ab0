"""A run's progress for people: one live line on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qrosa.quantities import bytes_text
from qrosa.record.logs import StepRecord
from qrosa.report.words import beside_loss
from qrosa.train.callbacks import Callback

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 10.0
_STAGES = {
    "load": "loading",
    "ranks": "measuring where ranks go",
    "svd": "fitting the low-rank part",
    "select": "selecting masks",
    "eval": "evaluating",
    "write rows": "writing calibration rows",
    "score": "scoring held-out rows",
    "weigh tokens": "weighing calibration tokens",
    "choose positions": "choosing sparse positions",
    "quantise": "quantising",
}


def make_progress(console: Console) -> PlainProgress:
    """The progress that suits where the output goes."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


class PlainProgress(Callback):
    """A line now and then, for logs: the first step, the last one, and one every few seconds between them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last = float("-inf")
        self._stage = ""

    def on_notice(self, text: str) -> None:
        """Printed at once."""
        self._print(f"note: {text}")

    def on_phase(self, name: str, done: int, total: int) -> None:
        """Printed when it begins and when it is done."""
        if name != self._stage:
            self._stage = name
            self._print(f"{_STAGES.get(name, name)} ...")
        if done >= total:
            self._stage = ""

    def on_step(self, record: StepRecord) -> None:
        """Printed if the last one was long enough ago."""
        now = time.monotonic()
        if record.step in (1, record.total) or now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self._print(describe(record))

    def on_evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Printed at once."""
        self._print(f"after step {step}: held-out loss {result['loss']:.4f}, {beside_loss(result)}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class LiveProgress(PlainProgress):
    """One line that is drawn over, with what is worth keeping printed above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._task: Any = None
        self._shown = ""

    def on_phase(self, name: str, done: int, total: int) -> None:
        """Moves the bar."""
        self._show(_STAGES.get(name, name), done, total, "")

    def on_step(self, record: StepRecord) -> None:
        """Moves the bar and shows the step's figures beside it."""
        figures = f"loss {record.loss:.4f}  {_speed(record)}  {_memory(record)}  {_left(record.seconds_left)} left"
        self._show(_phase(record.phase), record.step, record.total, figures)

    def on_end(self) -> None:
        """Takes the bar away."""
        self._bar.stop()

    def _show(self, what: str, done: int, total: int, figures: str) -> None:
        self._bar.start()
        if what != self._shown and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if self._task is None:
            self._task = self._bar.add_task(what, completed=done, total=total, figures=figures)
            self._shown = what
        else:
            self._bar.update(self._task, completed=done, total=total, figures=figures)


def describe(record: StepRecord) -> str:
    """A step as one line of a log."""
    return (
        f"step {record.step}/{record.total}  {_phase(record.phase)}  loss {record.loss:.4f}  {_speed(record)}  "
        f"{_memory(record)}  {_left(record.seconds_left)} left"
    )


def _phase(phase: str) -> str:
    return {"warmup": "warm-up", "train": "training"}.get(phase, phase)


def _speed(record: StepRecord) -> str:
    return f"{record.tokens_per_s:,.0f} tokens/s"


def _memory(record: StepRecord) -> str:
    planned = f" of {bytes_text(record.planned)} planned" if record.planned else ""
    return f"{bytes_text(record.memory)}{planned}"


def _left(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
