"""What a run tells while it works, and to whom: the terminal, the trackers, and whatever else listens.

A run knows one list of callbacks and calls them in order; the terminal's progress and the trackers are two of them and
have no door of their own. A callback may stop a run by raising; what it raises leaves the run as any other fault does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qrosa.record.logs import StepRecord

Advance = Callable[[int, int], None]
"""Told of work that goes on: called with (units done, units in all)."""


class Callback:
    """Hears what a run does and shows nothing; derive from it and override what is of interest."""

    def on_start(self, settings: Mapping[str, Any], step: int) -> None:
        """The run's folder is open and steps begin, after ``step`` that are done; the settings are resolved."""

    def on_notice(self, text: str) -> None:
        """Something that people should know, such as a smaller micro-batch."""

    def on_phase(self, name: str, done: int, total: int) -> None:
        """Work other than steps has come this far: ``load``, ``ranks``, ``svd``, ``select`` or ``eval``."""

    def on_step(self, record: StepRecord) -> None:
        """An optimizer step is done, and stands in the log."""

    def on_evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """An evaluation after ``step`` steps is done: ``{"rows", "supervised_tokens", "loss", "perplexity"}``."""

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint of ``step`` lies in ``folder``, whole."""

    def on_end(self) -> None:
        """The run has ended, well or not."""


class Callbacks(Callback):
    """Several callbacks as one, called in order."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)

    def on_start(self, settings: Mapping[str, Any], step: int) -> None:
        """Told to each."""
        for callback in self.callbacks:
            callback.on_start(settings, step)

    def on_notice(self, text: str) -> None:
        """Told to each."""
        for callback in self.callbacks:
            callback.on_notice(text)

    def on_phase(self, name: str, done: int, total: int) -> None:
        """Told to each."""
        for callback in self.callbacks:
            callback.on_phase(name, done, total)

    def on_step(self, record: StepRecord) -> None:
        """Told to each."""
        for callback in self.callbacks:
            callback.on_step(record)

    def on_evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Told to each."""
        for callback in self.callbacks:
            callback.on_evaluation(step, result)

    def on_save(self, step: int, folder: Path) -> None:
        """Told to each."""
        for callback in self.callbacks:
            callback.on_save(step, folder)

    def on_end(self) -> None:
        """Told to each, in reverse order."""
        for callback in reversed(self.callbacks):
            callback.on_end()

    def phase(self, name: str) -> Advance:
        """What tells of one phase's progress."""
        return lambda done, total: self.on_phase(name, done, total)
